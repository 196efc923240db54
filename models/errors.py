"""Everything that can go wrong with a request, as a tree of six leaves.

HeliographError
 ├── InvalidRequest     the caller's mistake: names the field and what is allowed
 │    └── DeadlineTooShort   no engine could keep it: says what could be kept
 ├── NotFound           a name that is not registered: the message lists what is
 ├── Overloaded         no room now: says when to come back
 ├── Unavailable        something the server needs does not answer: says when to come back
 ├── Cancelled          somebody asked for the work to stop
 └── GenerationFailed   the work was tried and no picture came of it

A class's docstring is its default message. Errors cross process borders, so all state lives in `args`.
"""


class HeliographError(Exception):
    """Something went wrong in Heliograph."""

    def __init__(self, message: str = ""):
        super().__init__(message or " ".join((type(self).__doc__ or "").split()))

    @property
    def message(self) -> str:
        return str(self.args[0])


class InvalidRequest(HeliographError):
    """The request is not valid. Correct the named field and send it again."""

    def __init__(self, field: str, message: str = ""):
        super().__init__(message)
        self.args = (field, message or self.args[0])

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"

    @property
    def field(self) -> str:
        return str(self.args[0])

    @property
    def message(self) -> str:
        return str(self.args[1])


class DeadlineTooShort(InvalidRequest):
    """The request takes longer than its deadline allows, also alone: give it `least_s` seconds or more."""

    def __init__(self, field: str, message: str = "", least_s: float = 0.0):
        super().__init__(field, message)
        self.args = (*self.args, float(least_s))

    @property
    def least_s(self) -> float:
        return float(self.args[2])


class NotFound(HeliographError):
    """There is nothing of that name. List what exists and choose from it."""


class _ComeBack(HeliographError):
    """Not now. Try again after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: float, message: str = ""):
        super().__init__(message)
        self.args = (float(retry_after_s), message or self.args[0])

    def __str__(self) -> str:
        return self.message

    @property
    def retry_after_s(self) -> float:
        return float(self.args[0])

    @property
    def message(self) -> str:
        return str(self.args[1])


class Overloaded(_ComeBack):
    """Too much work is waiting. Try again after `retry_after_s` seconds."""


class Unavailable(_ComeBack):
    """Something that the server needs does not answer. Try again after `retry_after_s` seconds."""


class Cancelled(HeliographError):
    """The request was cancelled before its pictures were finished."""


class GenerationFailed(HeliographError):
    """No picture came of it. The reason tells whether sending the request again can help.

    `reason` is one of `nan_latents`, `constant_picture`, `out_of_memory`, `deadline`, `replica_lost`, `engine_fault`.
    """

    RETRYABLE = frozenset({"out_of_memory", "replica_lost", "engine_fault"})

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message or f"generation failed: {reason}")
        self.args = (reason, self.args[0])

    def __str__(self) -> str:
        return self.message

    @property
    def reason(self) -> str:
        return str(self.args[0])

    @property
    def message(self) -> str:
        return str(self.args[1])

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed when it is simply sent again."""
        return self.reason in self.RETRYABLE
