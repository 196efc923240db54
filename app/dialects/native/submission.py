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
from app.dialects.native import job_form
from app.dialects.native.bodies import Delivered
from app.errors import InFlight
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
        for field in ("webhook_url", "response"):
            if getattr(body, field) not in (None, "base64"):
                raise InvalidRequest(field, 'needs "async": true')
        if key is None:
            return None
    webhook = None
    if body.webhook_url is not None:
        webhook = Webhook(url=body.webhook_url, events=tuple(body.webhook_events or ("completed",)))
    response = body.response or ("url" if body.asynchronous else "base64")
    known = None if key is None else idempotency(request, key, {"accept": media_type, **_hashed(body.model_dump())})
    return Delivery(webhook=webhook, response=response, idempotency=known)


def idempotency(request: Request, key: str, body: Any) -> Idempotency:
    """A caller's key, for this path and this body. Raises InvalidRequest for what is no key."""
    return Idempotency(route=request.url.path, key=key, fingerprint=fingerprint(body))


async def answer(
    request: Request, jobs: Jobs, wanted: Delivery, asynchronous: bool, submit: Submit, at_once: Answer
) -> Response:
    """Submits a job, unless its key has made one before, and answers with it, or with what `at_once` makes of it.

    Raises InFlight where the pictures are wanted at once and the key's job is not finished yet.
    """
    found = await jobs.earlier(wanted.idempotency) if wanted.idempotency else None
    if found is None:
        found = await wire.unless_disconnected(request, _awaited(submit(wanted)))
    if asynchronous:
        return await accepted(request, jobs, found)
    job = found.job
    if not job.finished and not found.replayed:
        job = await wire.unless_disconnected(request, jobs.wait(job.id, AT_ONCE_S))
    if not job.finished:
        raise InFlight(LOOK_AGAIN_S)
    if job.state is not State.SUCCEEDED or job.data_removed:
        raise ended_by(job)
    response = await at_once(job)
    response.headers.update(_replayed(found))
    return response


async def accepted(request: Request, jobs: Jobs, found: Submission) -> Response:
    """202 with the job; 200 where it was finished within the time that Prefer gives it."""
    job, wait_s = found.job, preferred_wait(request)
    headers = {"location": job_form.path(job.id), **_replayed(found)}
    if wait_s is not None:
        job = await wire.unless_disconnected(request, jobs.wait(job.id, wait_s))
        headers["preference-applied"] = f"wait={wait_s}"
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


async def _awaited(submission: Awaitable[Submission]) -> Submission:
    return await submission
