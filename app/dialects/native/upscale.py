"""`POST /v1/upscale`: a picture comes back larger. Its wire model, its path and its answers."""

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from app import links, wire
from app.dialects.native import forms, job_form, requests, submission
from app.dialects.native.bodies import Delivered, Encoded, OutputFormat, within
from app.dialects.native.schemas import ANSWERS, JSON, body_schema
from app.events import Upscaled
from app.jobs.job import Job, Submission
from app.jobs.service import Delivery
from app.service import Service
from models import limits
from models.errors import InvalidRequest
from models.images import MEDIA_TYPES, ImageFormat
from models.parts import Upscale


class UpscaleBody(Delivered):
    """What to make larger, and by how much."""

    image: Encoded = Field(description="PNG, JPEG, WebP or AVIF: base64, a data URI or an http(s) address")
    scale: float = within(limits.UPSCALE, "How many times as wide and as high, fractions too; 2 when left out", 2.0)
    model: str | None = Field(None, description="An upscaler from GET /v1/adapters; the default one when left out")
    output_format: OutputFormat | None = Field(None, description="png when left out; jpg is jpeg")


def add(router: APIRouter, service: Service) -> None:
    """Adds the path."""
    extra = body_schema(UpscaleBody, form=True)

    @router.post("/upscale", summary="Make a picture larger", openapi_extra=extra, responses=ANSWERS)
    async def upscale(request: Request) -> Response:
        started = time.monotonic()
        body = await forms.read(request, UpscaleBody)
        media_type, format = _answer_as(request.headers.get("accept", ""), body)
        wanted = Upscale(scale=body.scale, model=body.model)
        delivery = submission.delivery(request, body, media_type)
        if delivery is not None:

            async def submit(delivery: Delivery) -> Submission:
                return await service.submit_upscale(await _picture(service, body), wanted, format, delivery)

            async def at_once(job: Job) -> Response:
                return await _kept(service, job, media_type)

            return await submission.answer(request, service.jobs, delivery, body.asynchronous, submit, at_once)
        picture = await wire.unless_disconnected(request, _picture(service, body))
        upscaled = await wire.unless_disconnected(request, service.upscale(picture, wanted, format))
        if media_type != JSON:
            return _bytes(upscaled)
        total_s = time.monotonic() - started
        size = len(upscaled.data)
        return await wire.written(size, lambda: wire.json_response(from_upscaled(upscaled, body.scale, total_s)))


async def _picture(service: Service, body: UpscaleBody) -> bytes:
    body = await links.resolved(body, service.pictures)
    return await asyncio.to_thread(requests.encoded_bytes, "image", body.image)


async def _kept(service: Service, job: Job, media_type: str) -> Response:
    """The answer of a job that enlarged, as it would have been at once."""
    [output] = job.outputs
    names = ("format", "width", "height", "model")
    upscaled = Upscaled(data=await service.jobs.data(output["key"]), **{name: output[name] for name in names})
    if media_type != JSON:
        return _bytes(upscaled)
    image = {"index": 0, "format": upscaled.format, "width": upscaled.width, "height": upscaled.height}
    encoded = await wire.written(len(upscaled.data), lambda: wire.encode_base64(upscaled.data))
    return wire.json_response(job_form.upscaling(job, [image | {"base64": encoded}]))


def from_upscaled(upscaled: Upscaled, scale: float, total_s: float) -> dict[str, Any]:
    """The JSON answer."""
    image = {"index": 0, "format": upscaled.format, "width": upscaled.width, "height": upscaled.height}
    return {
        "id": uuid.uuid4().hex,
        "created": int(time.time()),
        "model": upscaled.model,
        "images": [image | {"base64": wire.encode_base64(upscaled.data)}],
        "parameters": {"scale": scale},
        "timings": {"total": round(total_s, 4)},
    }


def _answer_as(accept: str, body: UpscaleBody) -> tuple[str, ImageFormat]:
    """The answer's media type and the picture's format. Raises NotAcceptable, or InvalidRequest for a contradiction."""
    asked = requests.canonical(body.output_format)
    if body.asynchronous:
        return wire.choose_media_type(accept, (JSON,)), asked
    first = MEDIA_TYPES[asked]
    chosen = wire.choose_media_type(accept, (JSON, first, *(kind for kind in MEDIA_TYPES.values() if kind != first)))
    if chosen == JSON:
        return JSON, asked
    if body.output_format is not None and chosen != first:
        raise InvalidRequest("output_format", f"is {body.output_format}, but Accept asks for {chosen}")
    return chosen, next(format for format, kind in MEDIA_TYPES.items() if kind == chosen)


def _bytes(upscaled: Upscaled) -> Response:
    """The picture itself, with what is short enough to be a header."""
    headers = {
        "x-model": upscaled.model,
        "x-size": f"{upscaled.width}x{upscaled.height}",
        "x-content-type-options": "nosniff",
    }
    return Response(upscaled.data, media_type=MEDIA_TYPES[upscaled.format], headers=headers)
