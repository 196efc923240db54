"""A job in this API's own form: how it stands, what it has drawn, and the answer that it would have had at once."""

import asyncio
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from app import wire
from app.dialects.native import answers, visiting
from app.drawing import GenerationResult
from app.jobs import canonical, outputs
from app.jobs.job import Job
from app.jobs.service import Estimate, Jobs
from app.jobs.states import State
from models.errors import InvalidRequest, NotFound, Unavailable
from models.events import Finished

PATIENCE_S = 30.0  # for the store to give a picture
_OF_AN_IMAGE = ("index", "seed", "width", "height", "format", "sha256")


def path(id: str) -> str:
    """Where a job is asked about."""
    return f"/v1/jobs/{id}"


async def form(jobs: Jobs, job: Job) -> dict[str, Any]:
    """A job as this API tells it, its result included."""
    told = await summary(jobs, job, await jobs.estimate(job))
    if job.state is State.SUCCEEDED and not job.data_removed:
        with suppress(InvalidRequest):  # another version knew fields that this one does not: the pictures are told
            told["result"] = await _result(jobs, job, told["images"])
    return told


async def summary(jobs: Jobs, job: Job, estimate: Estimate) -> dict[str, Any]:
    """A job without its result."""
    return _told(job, [await image(jobs, output) for output in job.outputs], estimate)


def of_row(job: Job) -> dict[str, Any]:
    """A job as its row alone tells it, for webhooks: pictures by the addresses that they had when they were stored."""
    images = [_about(output) | {"url": output.get("url")} for output in job.outputs]
    told = _told(job, images, Estimate(position=None, eta_s=None))
    if job.state is State.SUCCEEDED:
        told["result"] = _answered(job, images)
    return told


def _told(job: Job, images: list[dict[str, Any]], estimate: Estimate) -> dict[str, Any]:
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
        "images": images,
        "result": None,
        "error": None if job.error is None else asdict(job.error),
        "urls": {"self": path(job.id), "events": f"{path(job.id)}/events", "cancel": f"{path(job.id)}/cancel"},
        "retry_of": job.retry_of,
        **visiting.told(visiting.arms_of(job)),
    }


def generation(job: Job, images: tuple[Finished, ...]) -> GenerationResult:
    """What the pictures of a job that drew would have been answered with at once."""
    assert job.result is not None
    request = canonical.from_json(job.request["request"])
    told = {name: job.result[name] for name in ("id", "created", "revision", "total_s")}
    told |= {"cached": job.result.get("cached", False), "receipt_id": job.result.get("receipt_id")}
    return GenerationResult(request=request, images=tuple(sorted(images, key=lambda image: image.index)), **told)


def upscaling(job: Job, images: list[dict[str, Any]]) -> dict[str, Any]:
    """The same for a job that enlarged."""
    assert job.result is not None
    return {
        "id": job.id,
        "created": job.result["created"],
        "receipt_id": job.result.get("receipt_id"),
        "model": job.outputs[0]["model"],
        "images": images,
        "parameters": {"scale": canonical.upscale_from_json(job.request["request"]).upscale.scale},
        "timings": {"total": round(job.result["total_s"], 4)},
    }


async def by_address(jobs: Jobs, job: Job) -> dict[str, Any]:
    """The answer of a job that has succeeded, with the addresses of its pictures."""
    return _answered(job, [await image(jobs, output) for output in job.outputs])


async def _result(jobs: Jobs, job: Job, images: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer that a synchronous request would have had, with pictures in the form that was asked for."""
    if job.request["response"] == "base64":
        told = zip(images, job.outputs, strict=True)
        images = [_without_url(image) | {"base64": await _base64(jobs, output["key"])} for image, output in told]
    return _answered(job, images)


def _answered(job: Job, images: list[dict[str, Any]]) -> dict[str, Any]:
    images = sorted(images, key=lambda image: image["index"])
    if canonical.is_upscale(job.request["request"]):
        return upscaling(job, images)
    return answers.answer(generation(job, tuple(outputs.finished(output) for output in job.outputs)), images)


async def _base64(jobs: Jobs, key: str) -> str | None:
    """None where the store does not give the picture: how the job stands is told all the same, and its address."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            data = await jobs.data(key)
    except (NotFound, Unavailable, TimeoutError):
        return None
    return await wire.written(len(data), lambda: wire.encode_base64(data))


def _without_url(image: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in image.items() if name != "url"}


async def image(jobs: Jobs, output: Any) -> dict[str, Any]:
    """A finished picture, by its address."""
    return _about(output) | {"url": await jobs.address(output["key"])}


def _about(output: Any) -> dict[str, Any]:
    return {name: output[name] for name in _OF_AN_IMAGE}
