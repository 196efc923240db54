"""The paths under `/v1/batches`: many requests in one file, which become jobs; in the shape of OpenAI's Batch API."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from app import wire
from app.auth import scope
from app.dialects.native import batch_lines, job_form, submission
from app.dialects.native.batch_lines import IMAGES
from app.dialects.native.forms import FORM
from app.errors import MalformedBody, code_of, envelope, status_of
from app.jobs.batches import Batch, Line
from app.jobs.failures import ended_by
from app.jobs.service import Jobs
from app.jobs.states import State
from app.service import Service
from models.errors import GenerationFailed, HeliographError, InvalidRequest

JSONL = "application/jsonl"
FILE = "file"
_LIST = ("after", "limit")
_TAKES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSONL: {"schema": {"type": "string", "description": "A request in each line"}},
            FORM: {"schema": {"type": "object", "properties": {FILE: {"type": "string", "format": "binary"}}}},
        },
    }
}


def add(router: APIRouter, service: Service) -> None:
    """Adds the paths, below the router's prefix."""
    of_jobs: dict[str, Any] = {"openapi_extra": scope("jobs")}

    @router.post("/batches", summary="Have many requests drawn", status_code=202, openapi_extra=_TAKES)
    async def submit(request: Request) -> Response:
        return await wire.unless_disconnected(request, _submitted(service, request))

    @router.get("/batches", summary="The caller's batches, the newest first", **of_jobs)
    async def batches(request: Request) -> Response:
        return await _listed(service.jobs, request)

    @router.get("/batches/{id}", summary="How a batch stands", **of_jobs)
    async def batch(id: str) -> Response:
        return wire.json_response(form(await service.jobs.batches.get(id)))

    @router.get("/batches/{id}/results", summary="The answers that are there, in the order of the lines", **of_jobs)
    async def results(id: str) -> Response:
        await service.jobs.batches.get(id)  # so that a batch that is not there is a status
        return StreamingResponse(_results(service.jobs, id), media_type=JSONL)

    @router.post("/batches/{id}/cancel", summary="End what a batch has not drawn yet", **of_jobs)
    async def cancel(id: str) -> Response:
        return wire.json_response(form(await service.jobs.batches.cancel(id)))


def form(batch: Batch) -> dict[str, Any]:
    """A batch as OpenAI tells it, as far as it has a meaning here."""
    counts = batch.counts
    ended = batch.finished_at
    return {
        "id": batch.id,
        "object": "batch",
        "status": _status(batch),
        "created_at": batch.created_at,
        "in_progress_at": batch.started_at,
        "cancelling_at": batch.cancelling_at,
        "completed_at": None if batch.cancelling_at is not None else ended,
        "cancelled_at": None if batch.cancelling_at is None else ended,
        "request_counts": {
            "total": batch.total,
            "completed": counts.get(State.SUCCEEDED, 0),
            "failed": sum(counts.get(state, 0) for state in (State.FAILED, State.CANCELLED, State.EXPIRED)),
        },
        "urls": {name: f"{_path(batch.id)}{end}" for name, end in _ENDS.items()},
    }


_ENDS = {"self": "", "results": "/results", "cancel": "/cancel"}


def _path(id: str) -> str:
    return f"/v1/batches/{id}"


def _status(batch: Batch) -> str:
    if batch.cancelling_at is not None:
        return "cancelled" if batch.finished else "cancelling"
    return "completed" if batch.finished else "in_progress"


async def _submitted(service: Service, request: Request) -> Response:
    file = await _file(request)
    key = request.headers.get("idempotency-key")
    digest = {FILE: hashlib.sha256(file).hexdigest()}
    known = None if key is None else submission.idempotency(request, key, digest)
    batches = service.jobs.batches
    found = await batches.earlier(known) if known else None
    if found is None:
        lines = await asyncio.to_thread(batch_lines.read, file, service.default_model, batches.most)
        found = await service.submit_batch(lines, known)
    headers = {"location": _path(found.batch.id)}
    headers |= {"idempotency-replayed": "true"} if found.replayed else {}
    return wire.json_response(form(found.batch), headers, 202)


async def _file(request: Request) -> bytes:
    """The body, or the file in it. Raises InvalidRequest, MalformedBody."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        return await request.body()
    fields, files = await wire.read_multipart(request)
    for name in (*fields, *files):
        if name != FILE:
            raise InvalidRequest(name, f"unknown field; a form has {FILE!r} alone")
    if len(files.get(FILE, ())) != 1:
        raise MalformedBody(FILE, "must be one file, with a filename")
    return files[FILE][0]


async def _listed(jobs: Jobs, request: Request) -> Response:
    asked = request.query_params
    for name, value in asked.items():
        if name not in _LIST:
            raise InvalidRequest(name, f"is no filter; there are: {', '.join(_LIST)}")
        if not value.isprintable():
            raise InvalidRequest(name, "must be printable")
    found, more = await jobs.batches.page(asked.get("after"), wire.number("limit", asked.get("limit", "20")))
    data = [form(batch) for batch in found]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return wire.json_response({"object": "list", "data": data, **ends, "has_more": more})


async def _results(jobs: Jobs, id: str) -> AsyncGenerator[bytes, None]:
    async with aclosing(jobs.batches.finished_lines(id)) as lines:
        async for line in lines:
            yield orjson.dumps(await _result(jobs, line)) + b"\n"


async def _result(jobs: Jobs, line: Line) -> dict[str, Any]:
    """A line of the results, in OpenAI's shape. A job that did not succeed has an `error`, and the answer it means."""
    job = line.job
    told: dict[str, Any] = {"id": job.id, "custom_id": line.custom_id}
    error: HeliographError | None = None
    body = None
    if job.state is not State.SUCCEEDED or job.data_removed:
        error = ended_by(job)
    else:
        body = (await job_form.form(jobs, job))["result"]
    if error is None and body is None:
        error = GenerationFailed("engine_fault", "another version drew it, with fields that this one does not know")
    if error is not None:
        answered = {"status_code": status_of(error), "request_id": job.id, "body": envelope(error)}
        return told | {"response": answered, "error": {"code": code_of(error), "message": error.message}}
    assert body is not None
    body = _images(body) if job.request["url"] == IMAGES else body
    return told | {"response": {"status_code": 200, "request_id": job.id, "body": body}, "error": None}


def _images(result: dict[str, Any]) -> dict[str, Any]:
    """The answer as OpenAI's images have it."""
    names = {"base64": "b64_json", "url": "url"}
    data = [{new: image[old] for old, new in names.items() if old in image} for image in result["images"]]
    return {"created": int(result["created"]), "data": data}
