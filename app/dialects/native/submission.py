"""Requests that become jobs: what they say of their delivery, and what they are answered.

Those are the asynchronous ones, and those with an `Idempotency-Key`: a job is what remembers that a request was made,
so that it is made once, and what came of it.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from app import wire
from app.dialects.native import job_form, visiting
from app.dialects.native.bodies import Delivered
from app.dialects.native.schemas import JSON
from app.errors import InFlight, envelope, headers_of, status_of
from app.jobs.failures import ended_by
from app.jobs.job import Idempotency, Job, Submission, Webhook, fingerprint
from app.jobs.service import Delivery, Jobs
from app.jobs.states import State
from models.errors import InvalidRequest

LONGEST_WAIT_S = 60  # that Prefer may ask for
AT_ONCE_S = 600.0  # that a caller who sent a key and wants the pictures at once waits for them
LOOK_AGAIN_S = 1.0

_WAIT = re.compile(r"\s*wait\s*(?:=\s*\"?(\d{1,9})\"?)?\s*", re.I)

Submit = Callable[[Delivery], Awaitable[Submission]]
Answer = Callable[[Job], Awaitable[Response]]


def delivery(request: Request, body: Delivered, media_type: str) -> Delivery | None:
    """How a request's job is told of; None for a request that is no job.

    Raises InvalidRequest for fields that do not go together.
    """
    key = request.headers.get("idempotency-key")
    if getattr(body, "stream", False) and (body.asynchronous or key is not None):
        field = "stream" if body.asynchronous else "Idempotency-Key"
        raise InvalidRequest(field, "does not go with the other: a stream is no job; a job has events of its own")
    if body.webhook_events is not None and body.webhook_url is None:
        raise InvalidRequest("webhook_events", "needs a webhook_url")
    if not body.asynchronous:
        if body.webhook_url is not None:
            raise InvalidRequest("webhook_url", 'needs "async": true')
        if body.response == "url" and media_type != JSON:
            raise InvalidRequest("response", f"`url` is for answers in JSON, and this one will be {media_type}")
        if key is None:
            return None
    webhook = None
    if body.webhook_url is not None:
        webhook = Webhook(url=body.webhook_url, events=tuple(body.webhook_events or ("completed",)))
    response = body.response or ("url" if body.asynchronous else "base64")
    said = body.model_dump(exclude_unset=True)  # so that a field that is yet to come leaves old requests what they are
    known = None if key is None else idempotency(request, key, {"accept": media_type, **_hashed(said)})
    return Delivery(webhook=webhook, response=response, cache=body.cache, idempotency=known)


def idempotency(request: Request, key: str, body: Any) -> Idempotency:
    """A caller's key, for this path and this body. Raises InvalidRequest for what is no key."""
    return Idempotency(route=request.url.path, key=key, fingerprint=fingerprint(body))


async def answer(
    request: Request, jobs: Jobs, wanted: Delivery, asynchronous: bool, submit: Submit, at_once: Answer
) -> Response:
    """Submits a job, unless its key has made one before, and answers with it, or with what `at_once` makes of it.

    Raises InFlight where the pictures are wanted at once and the key's job is not finished yet.
    """
    wait_s = preferred_wait(request) if asynchronous else None  # before there is a job
    found = await jobs.earlier(wanted.idempotency) if wanted.idempotency else None
    if found is None:
        found = await wire.unless_disconnected(request, submit(wanted))
    if asynchronous:
        return await accepted(request, jobs, found, wait_s)
    job = found.job
    if not job.finished and not found.replayed:
        job = await wire.unless_disconnected(request, jobs.wait(job.id, AT_ONCE_S))
    if not job.finished:
        raise InFlight(LOOK_AGAIN_S)
    if job.state is not State.SUCCEEDED or job.data_removed:
        error = ended_by(job)
        return wire.json_response(envelope(error), headers_of(error) | _replayed(found), status_of(error))
    response = await at_once(job)
    response.headers.update(_replayed(found))
    return response


async def accepted(request: Request, jobs: Jobs, found: Submission, wait_s: int | None) -> Response:
    """202 with the job; 200 where it was finished within the time that Prefer gives it."""
    job = found.job
    headers = {"location": job_form.path(job.id), **_replayed(found)}
    if wait_s is not None:
        job = await wire.unless_disconnected(request, jobs.wait(job.id, wait_s))
        headers["preference-applied"] = f"wait={wait_s}"
    headers |= visiting.headers(visiting.arms_of(job))
    status = 200 if wait_s is not None and job.finished else 202
    return wire.json_response(await job_form.form(jobs, job), headers, status)


def preferred_wait(request: Request) -> int | None:
    """The seconds of `Prefer: wait=5` (RFC 7240, 4.3), None where it is not asked for. Raises InvalidRequest."""
    asked = [found for part in request.headers.get("prefer", "").split(",") if (found := _WAIT.fullmatch(part))]
    if not asked:
        return None
    seconds = int(asked[0][1] or LONGEST_WAIT_S)
    if not 1 <= seconds <= LONGEST_WAIT_S:
        raise InvalidRequest("Prefer", f"must have a wait of 1 to {LONGEST_WAIT_S} seconds, not {seconds}")
    return seconds


def _replayed(found: Submission) -> dict[str, str]:
    return {"idempotency-replayed": "true"} if found.replayed else {}


def _hashed(value: Any) -> Any:
    """A body with the hash of each file in the place of its bytes."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, dict):
        return {key: _hashed(part) for key, part in value.items()}
    return [_hashed(part) for part in value] if isinstance(value, list) else value
