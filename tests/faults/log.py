"""What happened, one line of JSON for each event, in the order in which the harness learnt of it.

The last lines tell how the database and the store stood at the end, so the checker needs nothing but the log. Times are
seconds since 1970.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app.jobs.job import EventKind
from app.jobs.states import State

FaultKind = Literal["model", "runner", "gateway", "proxy", "controller", "database", "disk", "store"]


class Event(BaseModel):
    """Something that happened."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    at: float = Field(default_factory=time.time)


class Owner(Event):
    """A caller, and how many jobs of theirs may run at a time."""

    type: Literal["owner"] = "owner"
    id: str
    at_once: int | None


class Submitted(Event):
    """One try to submit a planned job. `status` is HTTP's, None where no answer came.

    `number` is the planned job's; every try of it has the same key, body and owner.
    """

    type: Literal["submitted"] = "submitted"
    number: int
    owner: str
    seed: int
    samples: int
    deadline: bool = False
    status: int | None
    job_id: str | None = None
    replayed: bool = False


class Seen(Event):
    """A job as its owner was shown it; `status` is `missing` for 404. `pictures` are the SHA-256s, by index."""

    type: Literal["seen"] = "seen"
    job_id: str
    status: State | Literal["missing"]
    attempt: int = 0
    pictures: tuple[str, ...] = ()
    result: bool = False


class Injected(Event):
    """A fault, from `at` to `until`; `target` says which process, or what was done to it."""

    type: Literal["injected"] = "injected"
    kind: FaultKind
    until: float
    target: str


class Hook(Event):
    """A webhook as it arrived. `status` is the job's in the body, `answered` what the receiver said."""

    type: Literal["hook"] = "hook"
    webhook_id: str
    job_id: str
    event: str
    status: str
    answered: int
    verified: bool


class Change(BaseModel):
    """One of a job's own events, as the database has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seq: int
    at: float
    kind: EventKind
    data: dict[str, Any]

    @property
    def state(self) -> State | None:
        """The state that the job went to, None for progress and outputs."""
        return State(self.data["state"]) if self.kind == "state" else None


class EndJob(Event):
    """A job's row at the end, with its events."""

    type: Literal["end_job"] = "end_job"
    job_id: str
    owner: str
    model: str
    priority: int
    state: State
    seed: int
    attempt: int
    deaths: int
    error: str | None
    webhook: bool
    result: bool
    changes: tuple[Change, ...]


class EndDelivery(Event):
    """A webhook's row in the outbox at the end."""

    type: Literal["end_delivery"] = "end_delivery"
    webhook_id: str
    job_id: str
    event: str
    state: Literal["pending", "delivered", "dead"]
    attempts: int


class EndPicture(Event):
    """A picture of a succeeded job, fetched at the end.

    `recorded` is the SHA-256 that the job tells, `found` that of what came, None where nothing did. `difference` is the
    largest of any pixel's channels from the picture of the same request drawn alone and undisturbed, None where they
    could not be compared.
    """

    type: Literal["end_picture"] = "end_picture"
    job_id: str
    index: int
    recorded: str
    found: str | None
    decodes: bool
    difference: int | None


AnyEvent = Owner | Submitted | Seen | Injected | Hook | EndJob | EndDelivery | EndPicture
_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(Annotated[AnyEvent, Field(discriminator="type")])


class Log:
    """Events on their way to a file; each is a line as soon as it is written."""

    def __init__(self, path: Path):
        self._file = path.open("x", buffering=1)

    def write(self, event: AnyEvent) -> None:
        self._file.write(event.model_dump_json() + "\n")

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Sequence[AnyEvent]:
    """Every event of a log, in its order."""
    return [_EVENT.validate_json(line) for line in path.read_text().splitlines()]
