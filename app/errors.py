"""Errors as HTTP: the one table from an error to its status and code, and the native envelope."""

import math
from typing import Any

from app.stores.store import StorageFull
from models.errors import (
    Cancelled,
    GenerationFailed,
    HeliographError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)

RETRY_AFTER_S = 5.0  # what a client is told when nobody knows better


class MalformedBody(InvalidRequest):
    """The body is not JSON."""


class BodyTooLarge(InvalidRequest):
    """The body is too large."""


class BodyTooSlow(InvalidRequest):
    """The body did not arrive in time."""


class NotAcceptable(InvalidRequest):
    """None of the media types in `Accept` can be given."""


class RangeNotSatisfiable(InvalidRequest):
    """The `Range` begins beyond the end."""


class Unauthenticated(HeliographError):
    """This server wants an API key, as `Authorization: Bearer hk_...` or `x-api-key: hk_...`."""


class Forbidden(HeliographError):
    """This is not allowed to who asks."""


class InFlight(Overloaded):
    """A request with this idempotency key is being worked on. Send it again after `retry_after_s` seconds."""


class ReplicaDied(GenerationFailed):
    """The replica died while it worked on the request."""


class NotRunning(GenerationFailed):
    """What the request needs does not run at the moment."""


class BudgetSpent(Overloaded):
    """This key has used up what it may have for now. Try again after `retry_after_s` seconds.

    `field` names the limit, `limit` is how much it allows, `remaining` how much of that is left.
    """

    def __init__(self, retry_after_s: float, message: str = "", field: str = "", limit: int = 0, remaining: int = 0):
        super().__init__(retry_after_s, message)
        self.args = (*self.args, field, limit, remaining)

    @property
    def field(self) -> str:
        return str(self.args[2])

    @property
    def limit(self) -> int:
        return int(self.args[3])

    @property
    def remaining(self) -> int:
        return int(self.args[4])


# The first line that fits counts: classes before their parents.
_STATUS: tuple[tuple[type[HeliographError], int, str], ...] = (
    (MalformedBody, 400, "malformed_body"),
    (BodyTooLarge, 413, "body_too_large"),
    (BodyTooSlow, 408, "body_too_slow"),
    (NotAcceptable, 406, "not_acceptable"),
    (RangeNotSatisfiable, 416, "range_not_satisfiable"),
    (InvalidRequest, 422, "invalid_request"),
    (Unauthenticated, 401, "unauthenticated"),
    (Forbidden, 403, "forbidden"),
    (NotFound, 404, "not_found"),
    (InFlight, 409, "in_flight"),
    (BudgetSpent, 429, "budget_spent"),
    (Overloaded, 429, "overloaded"),
    (StorageFull, 507, "storage_full"),
    (Unavailable, 503, "unavailable"),
    (Cancelled, 499, "cancelled"),
    (GenerationFailed, 500, "generation_failed"),
    (HeliographError, 500, "internal_error"),
)
_REASON_STATUS = {
    "deadline": 504,
    "replica_lost": 503,
    "out_of_memory": 503,
    "engine_fault": 503,
    "nan_latents": 500,
    "constant_picture": 500,
}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def status_of(error: HeliographError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, GenerationFailed):
        return _REASON_STATUS.get(error.reason, 500)
    return next(status for kind, status, _ in _STATUS if isinstance(error, kind))


def code_of(error: HeliographError) -> str:
    """The word that programs compare: a failure's reason, otherwise the kind of error."""
    if isinstance(error, GenerationFailed):
        return error.reason
    return next(code for kind, _, code in _STATUS if isinstance(error, kind))


def headers_of(error: HeliographError) -> dict[str, str]:
    """Retry-After in whole seconds wherever coming back can help; what a 401 must say; how much a budget has left."""
    if isinstance(error, Unauthenticated):
        return {"www-authenticate": 'Bearer realm="heliograph"'}
    if isinstance(error, Overloaded | Unavailable):
        seconds = max(1, math.ceil(error.retry_after_s))
        budget = ratelimit(error.limit, error.remaining, seconds) if isinstance(error, BudgetSpent) else {}
        return {"retry-after": str(seconds)} | budget
    if is_retryable(error):
        return {"retry-after": str(math.ceil(RETRY_AFTER_S))}
    return {}


def ratelimit(limit: int, remaining: int, reset_s: float) -> dict[str, str]:
    """The headers that say how much of a limit is left, and in how many seconds there is all of it again.

    The three of draft-ietf-httpapi-ratelimit-headers-03, which clients know; later drafts have one header for all.
    """
    return {
        "ratelimit-limit": str(limit),
        "ratelimit-remaining": str(remaining),
        "ratelimit-reset": str(math.ceil(reset_s)),
    }


def is_retryable(error: HeliographError) -> bool:
    """Whether the same request may succeed when it is simply sent again."""
    return isinstance(error, Overloaded | Unavailable) or (isinstance(error, GenerationFailed) and error.retryable)


def envelope(error: HeliographError) -> dict[str, Any]:
    """The native answer's body for an error."""
    body: dict[str, Any] = {"code": code_of(error), "message": error.message}
    if isinstance(error, InvalidRequest | BudgetSpent):
        body["field"] = error.field
    return {"error": body | {"retryable": is_retryable(error)}}


def http_envelope(status: int, message: str) -> dict[str, Any]:
    """The native body for what never reached us as a request: no such path, wrong method, our own fault."""
    return {"error": {"code": _HTTP_CODES.get(status, "internal_error"), "message": message, "retryable": False}}
