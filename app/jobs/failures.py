"""Errors that a job's row keeps, and the same errors told again to whoever asks for the result."""

from app.errors import RETRY_AFTER_S, code_of, is_retryable
from app.jobs.job import Job, JobError
from app.jobs.states import State
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

FAULT = JobError(code="internal_error", message="Heliograph made a mistake; its log has the details")


def job_error(error: HeliographError) -> JobError:
    """An error as a job's row keeps it."""
    field = error.field if isinstance(error, InvalidRequest) else None
    return JobError(code=code_of(error), message=error.message, field=field, retryable=is_retryable(error))


def ended_by(job: Job) -> HeliographError:
    """Why a finished job has no result to give."""
    if job.state is State.CANCELLED:
        return Cancelled("the job was cancelled before its pictures were finished")
    if job.state is State.EXPIRED:
        return GenerationFailed("deadline", "the pictures were not finished in time")
    if job.error is None:
        return NotFound("the job's result has been removed")
    match job.error.code:
        case "invalid_request":
            return InvalidRequest(job.error.field or "request", job.error.message)
        case "not_found":
            return NotFound(job.error.message)
        case "cancelled":
            return Cancelled(job.error.message)
        case "overloaded":
            return Overloaded(RETRY_AFTER_S, job.error.message)
        case "storage_full":
            return StorageFull(RETRY_AFTER_S, job.error.message)
        case "unavailable":
            return Unavailable(RETRY_AFTER_S, job.error.message)
        case reason:
            return GenerationFailed(reason, job.error.message)
