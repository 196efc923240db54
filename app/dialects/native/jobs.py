"""The paths under `/v1/jobs`: jobs one by one and in pages, ended, tried again; and their events."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import wire
from app.auth import scope
from app.dialects.native import job_form, submission
from app.jobs.job import JobEvent
from app.jobs.service import Estimate, Jobs
from app.jobs.states import State
from app.service import Service
from models.errors import InvalidRequest, Unavailable

KEEP_ALIVE_S = 15.0
_FILTERS = ("status", "model", "kind", "cursor", "limit")


def add(router: APIRouter, service: Service) -> None:
    """Adds the paths, below the router's prefix."""
    of_jobs: dict[str, Any] = {"openapi_extra": scope("jobs")}

    @router.get("/jobs", summary="The caller's jobs, the newest first", **of_jobs)
    async def jobs(request: Request) -> Response:
        return await _listed(service.jobs, request)

    @router.get("/jobs/{id}", summary="One job", **of_jobs)
    async def job(request: Request, id: str) -> Response:
        return await one(service.jobs, request, id)

    @router.post("/jobs/{id}/cancel", summary="End a job, whether it waits or runs", **of_jobs)
    async def cancel(id: str) -> Response:
        return wire.json_response(await job_form.form(service.jobs, await service.jobs.cancel(id)))

    @router.post("/jobs/{id}/retry", summary="A job that failed anew, as another job", status_code=202, **of_jobs)
    async def retry(request: Request, id: str) -> Response:
        key = request.headers.get("idempotency-key")
        known = None if key is None else submission.idempotency(request, key, {})
        wait_s = submission.preferred_wait(request)
        return await submission.accepted(request, service.jobs, await service.jobs.retry(id, known), wait_s)

    @router.get("/jobs/{id}/events", summary="What happens to a job, as server-sent events", **of_jobs)
    async def events(request: Request, id: str) -> Response:
        await service.jobs.get(id)  # so that a job that is not there is a status and not an event
        return wire.EventStream(_events(service.jobs, id, _last_seen(request)))


async def one(jobs: Jobs, request: Request, id: str) -> Response:
    """A job; where Prefer asks to wait, once it is finished or the time is over."""
    wait_s = submission.preferred_wait(request)
    if wait_s is None:
        return wire.json_response(await job_form.form(jobs, await jobs.get(id)))
    job = await wire.unless_disconnected(request, jobs.wait(id, wait_s))
    return wire.json_response(await job_form.form(jobs, job), {"preference-applied": f"wait={wait_s}"})


async def _listed(jobs: Jobs, request: Request) -> Response:
    """A page; positions, estimates and results are told of single jobs alone."""
    asked = request.query_params
    for name in asked:
        if name not in _FILTERS:
            raise InvalidRequest(name, f"is no filter; there are: {', '.join(_FILTERS)}")
        if not all(value.isprintable() for value in asked.getlist(name)):  # no database would compare a NUL
            raise InvalidRequest(name, "must be printable")
    page = await jobs.list(
        [_state(value) for text in asked.getlist("status") for value in text.split(",")],
        asked.get("model"),
        asked.get("kind"),
        asked.get("cursor"),
        wire.number("limit", asked.get("limit", "50")),
    )
    nothing = Estimate(position=None, eta_s=None)
    return wire.json_response(
        {"jobs": [await job_form.summary(jobs, j, nothing) for j in page.jobs], "next": page.next}
    )


def _state(text: str) -> State:
    if text not in list(State):
        raise InvalidRequest("status", f"must be one of {', '.join(State)}, not {text[:40]!r}")
    return State(text)


def _last_seen(request: Request) -> int:
    return wire.number("Last-Event-ID", request.headers.get("last-event-id", "0"))


async def _events(jobs: Jobs, id: str, after_seq: int) -> AsyncGenerator[bytes, None]:
    """The events from the one after `after_seq` on, and comments while there are none, so that nobody hangs up.

    Where the database stays away they end before the job: whoever reads on takes them up by `Last-Event-ID`.
    """
    said = time.monotonic()
    async with aclosing(jobs.events(id, after_seq)) as events:
        try:
            async for event in events:
                if event is not None:
                    yield wire.server_sent_event(event.kind, await _told(jobs, event), event.seq)
                elif time.monotonic() - said >= KEEP_ALIVE_S:
                    yield b": still here\n\n"
                else:
                    continue
                said = time.monotonic()
        except Unavailable as away:
            yield f": {away.message}; come back\n\n".encode()


async def _told(jobs: Jobs, event: JobEvent) -> dict[str, Any]:
    told = {"job_id": event.job_id, "at": event.at}
    if event.kind == "output":
        return told | await job_form.image(jobs, event.data["output"])
    if event.kind == "state":
        state = {name: value for name, value in event.data.items() if name != "state"}
        return told | {"status": event.data["state"], **state}
    return told | dict(event.data)
