"""Jobs: their own form, the paths under `/v1/jobs`, and their events."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import wire
from app.auth import scope
from app.dialects.native import answers, submission
from app.jobs import canonical, outputs
from app.jobs.job import Job, JobEvent
from app.jobs.service import Estimate, Jobs
from app.jobs.states import State
from app.service import GenerationResult, Service
from models.errors import InvalidRequest
from models.events import Finished

KEEP_ALIVE_S = 15.0
_FILTERS = ("status", "model", "kind", "cursor", "limit")
_OF_AN_IMAGE = ("index", "seed", "width", "height", "format", "sha256")


def path(id: str) -> str:
    """Where a job is asked about."""
    return f"/v1/jobs/{id}"


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
        return wire.json_response(await form(service.jobs, await service.jobs.cancel(id)))

    @router.post("/jobs/{id}/retry", summary="A job that failed anew, as another job", status_code=202, **of_jobs)
    async def retry(request: Request, id: str) -> Response:
        key = request.headers.get("idempotency-key")
        known = None if key is None else submission.idempotency(request, key, {})
        return await submission.accepted(request, service.jobs, await service.jobs.retry(id, known))

    @router.get("/jobs/{id}/events", summary="What happens to a job, as server-sent events", **of_jobs)
    async def events(request: Request, id: str) -> Response:
        await service.jobs.get(id)  # so that a job that is not there is a status and not an event
        return wire.EventStream(_events(service.jobs, id, _last_seen(request)))


async def one(jobs: Jobs, request: Request, id: str) -> Response:
    """A job; where Prefer asks to wait, once it is finished or the time is over."""
    wait_s = submission.preferred_wait(request)
    if wait_s is None:
        return wire.json_response(await form(jobs, await jobs.get(id)))
    job = await wire.unless_disconnected(request, jobs.wait(id, wait_s))
    return wire.json_response(await form(jobs, job), {"preference-applied": f"wait={wait_s}"})


async def form(jobs: Jobs, job: Job) -> dict[str, Any]:
    """A job as this API tells it, its result included."""
    told = await _summary(jobs, job, await jobs.estimate(job))
    if job.state is State.SUCCEEDED and not job.data_removed:
        told["result"] = await _result(jobs, job, told["images"])
    return told


async def _summary(jobs: Jobs, job: Job, estimate: Estimate) -> dict[str, Any]:
    position = estimate.position
    return {
        "job_id": job.id,
        "status": job.state,
        "model": job.model,
        "kind": job.kind,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "attempt": job.attempt,
        "progress": None if job.progress is None else asdict(job.progress),
        "position": None if position is None else {"ahead": position.ahead, "exact": position.exact},
        "eta_s": estimate.eta_s,
        "images": [await _image(jobs, output) for output in job.outputs],
        "result": None,
        "error": None if job.error is None else asdict(job.error),
        "urls": {"self": path(job.id), "events": f"{path(job.id)}/events", "cancel": f"{path(job.id)}/cancel"},
        "retry_of": job.retry_of,
    }


def generation(job: Job, images: tuple[Finished, ...]) -> GenerationResult:
    """What the pictures of a job that drew would have been answered with at once."""
    assert job.result is not None
    request = canonical.from_json(job.request["request"])
    told = {name: job.result[name] for name in ("id", "created", "revision", "total_s")}
    return GenerationResult(request=request, images=tuple(sorted(images, key=lambda image: image.index)), **told)


def upscaling(job: Job, images: list[dict[str, Any]]) -> dict[str, Any]:
    """The same for a job that enlarged."""
    assert job.result is not None
    return {
        "id": job.id,
        "created": job.result["created"],
        "model": job.outputs[0]["model"],
        "images": images,
        "parameters": {"scale": job.request["request"]["upscale"]["scale"]},
        "timings": {"total": round(job.result["total_s"], 4)},
    }


async def _result(jobs: Jobs, job: Job, images: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer that a synchronous request would have had, with pictures in the form that was asked for."""
    if job.request["response"] == "base64":
        data = {output["index"]: await jobs.data(output["key"]) for output in job.outputs}
        images = [_without_url(image) | {"base64": wire.encode_base64(data[image["index"]])} for image in images]
    images = sorted(images, key=lambda image: image["index"])
    if job.kind == canonical.UPSCALE:
        return upscaling(job, images)
    return answers.answer(generation(job, tuple(outputs.finished(output) for output in job.outputs)), images)


def _without_url(image: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in image.items() if name != "url"}


async def _image(jobs: Jobs, output: Any) -> dict[str, Any]:
    return {name: output[name] for name in _OF_AN_IMAGE} | {"url": await jobs.address(output["key"])}


async def _listed(jobs: Jobs, request: Request) -> Response:
    """A page; positions, estimates and results are told of single jobs alone."""
    asked = request.query_params
    for name in asked:
        if name not in _FILTERS:
            raise InvalidRequest(name, f"is no filter; there are: {', '.join(_FILTERS)}")
    page = await jobs.list(
        [_state(value) for text in asked.getlist("status") for value in text.split(",")],
        asked.get("model"),
        asked.get("kind"),
        asked.get("cursor"),
        _number("limit", asked.get("limit", "50")),
    )
    nothing = Estimate(position=None, eta_s=None)
    return wire.json_response({"jobs": [await _summary(jobs, j, nothing) for j in page.jobs], "next": page.next})


def _state(text: str) -> State:
    if text not in list(State):
        raise InvalidRequest("status", f"must be one of {', '.join(State)}, not {text[:40]!r}")
    return State(text)


def _number(field: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidRequest(field, f"must be a whole number, not {text[:40]!r}")
    return int(text)


def _last_seen(request: Request) -> int:
    return _number("Last-Event-ID", request.headers.get("last-event-id", "0"))


async def _events(jobs: Jobs, id: str, after_seq: int) -> AsyncGenerator[bytes, None]:
    """The events from the one after `after_seq` on, and comments while there are none, so that nobody hangs up."""
    said = time.monotonic()
    async with aclosing(jobs.events(id, after_seq)) as events:
        async for event in events:
            if event is not None:
                yield wire.server_sent_event(event.kind, await _told(jobs, event), event.seq)
            elif time.monotonic() - said >= KEEP_ALIVE_S:
                yield b": still here\n\n"
            else:
                continue
            said = time.monotonic()


async def _told(jobs: Jobs, event: JobEvent) -> dict[str, Any]:
    told = {"job_id": event.job_id, "at": event.at}
    if event.kind == "output":
        return told | await _image(jobs, event.data["output"])
    if event.kind == "state":
        state = {name: value for name, value in event.data.items() if name != "state"}
        return told | {"status": event.data["state"], **state}
    return told | dict(event.data)
