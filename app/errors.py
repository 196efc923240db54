"""Errors as HTTP: the one table from an error to its status and code, and the native envelope."""

import math
from typing import Any

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


class NotAcceptable(InvalidRequest):
    """None of the media types in `Accept` can be given."""


# The first line that fits counts: classes before their parents.
_STATUS: tuple[tuple[type[HeliographError], int, str], ...] = (
    (MalformedBody, 400, "malformed_body"),
    (BodyTooLarge, 413, "body_too_large"),
    (NotAcceptable, 406, "not_acceptable"),
    (InvalidRequest, 422, "invalid_request"),
    (NotFound, 404, "not_found"),
    (Overloaded, 429, "overloaded"),
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
    """Retry-After in whole seconds wherever coming back can help."""
    if isinstance(error, Overloaded | Unavailable):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if is_retryable(error):
        return {"retry-after": str(math.ceil(RETRY_AFTER_S))}
    return {}


def is_retryable(error: HeliographError) -> bool:
    """Whether the same request may succeed when it is simply sent again."""
    return isinstance(error, Overloaded | Unavailable) or (isinstance(error, GenerationFailed) and error.retryable)


def envelope(error: HeliographError) -> dict[str, Any]:
    """The native answer's body for an error."""
    body: dict[str, Any] = {"code": code_of(error), "message": error.message}
    if isinstance(error, InvalidRequest):
        body["field"] = error.field
    return {"error": body | {"retryable": is_retryable(error)}}


def http_envelope(status: int, message: str) -> dict[str, Any]:
    """The native body for what never reached us as a request: no such path, wrong method, our own fault."""
    return {"error": {"code": _HTTP_CODES.get(status, "internal_error"), "message": message, "retryable": False}}
