"""`POST /v1/upscale`: a picture comes back larger. Its wire model, its path and its answers.

An upscaler enlarges it, or a model that draws it anew, at its own factor and with fields of its own.
"""

import asyncio
import hashlib
import time
import uuid
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from app import links, wire
from app.dialects.native import answering, forms, job_form, requests, submission
from app.dialects.native.bodies import Delivered, Encoded, OutputFormat, within
from app.dialects.native.schemas import ANSWERS, JSON, body_schema
from app.events import Upscaled
from app.jobs.job import Job, Submission
from app.jobs.service import Delivery
from app.service import Service
from models import limits
from models.card import ModelCard
from models.errors import InvalidRequest
from models.images import MEDIA_TYPES, ImageFormat, Picture
from models.parts import Upscale
from models.request import GenerationRequest, Metadata

_OF_A_MODEL = (
    *("prompt", "negative_prompt", "noise_level", "steps", "guidance_scale", "seed", "sampler", "schedule"),
    *("metadata", "deadline_s"),
)


class UpscaleBody(Delivered):
    """What to make larger, and by how much. The fields behind `output_format` are for models, not for upscalers."""

    image: Encoded = Field(description="PNG, JPEG, WebP or AVIF: base64, a data URI or an http(s) address")
    scale: float | None = within(
        limits.UPSCALE, "How many times as wide and as high, fractions too; 2, or the model's own, when left out"
    )
    model: str | None = Field(None, description="An upscaler from GET /v1/adapters; the default one when left out")
    output_format: OutputFormat | None = Field(None, description="png when left out; jpg is jpeg")
    prompt: str | None = Field(None, description="What the picture shows; nothing when left out")
    negative_prompt: str | None = Field(None, description="What it should not show")
    noise_level: int | None = within(limits.NOISE_LEVEL, "How much noise the model puts on the picture")
    steps: int | None = within(limits.STEPS, "Denoising steps")
    guidance_scale: float | None = within(limits.GUIDANCE_SCALE, "How closely to follow the prompt; 1 is not at all")
    seed: int | None = within(limits.SEED, "Random when left out")
    sampler: str | None = Field(None, description="A name from GET /v1/samplers")
    schedule: str | None = Field(None, description="The sampler's spacing of noise levels")
    metadata: Metadata | None = Field(None, description="What the file tells of its making; none when left out")
    deadline_s: float | None = within(limits.DEADLINE_S, "Seconds after which the picture is of no use")


def add(router: APIRouter, service: Service) -> None:
    """Adds the path."""
    extra = body_schema(UpscaleBody, form=True)

    @router.post("/upscale", summary="Make a picture larger", openapi_extra=extra, responses=ANSWERS)
    async def upscale(request: Request) -> Response:
        started = time.monotonic()
        body = await forms.read(request, UpscaleBody)
        media_type, format = _answer_as(request.headers.get("accept", ""), body)
        if body.model in service.upscaling_models:
            drawn = partial(_drawing, service, body, service.card(body.model), format)
            return await answering.answer(request, service, body, body.model, "upscale", media_type, drawn)
        wanted = to_upscale(body)
        asynchronous = await submission.becomes_job(service, body, None)
        delivery = submission.delivery(request, body, media_type, asynchronous)
        if delivery is not None:

            async def submit(delivery: Delivery) -> Submission:
                return await service.submit_upscale(await _picture(service, body), wanted, format, delivery)

            async def at_once(job: Job) -> Response:
                return await _kept(service, job, media_type)

            return await submission.answer(request, service.jobs, delivery, asynchronous, submit, at_once)
        as_url = body.response == "url"
        if as_url:
            service.check_urls()
        picture = await wire.unless_disconnected(request, _picture(service, body))
        upscaled = await wire.unless_disconnected(request, service.upscale(picture, wanted, format, urls=as_url))
        if media_type != JSON:
            return _bytes(upscaled)
        url = (await service.urls(upscaled))[0] if as_url else None
        total_s = time.monotonic() - started
        size = len(upscaled.data)
        return await wire.written(size, lambda: wire.json_response(from_upscaled(upscaled, wanted.scale, total_s, url)))


def to_request(body: UpscaleBody, card: ModelCard, picture: bytes, format: ImageFormat) -> GenerationRequest:
    """For a model. Raises InvalidRequest for what is no picture, and for another scale than the model's."""
    if card.upscaling is not None and body.scale not in (None, card.upscaling.scale):
        raise InvalidRequest("scale", f"must be left out or {card.upscaling.scale}, which is what {card.name} does")
    values: dict[str, Any] = {"prompt": ""} | body.model_dump(include=set(_OF_A_MODEL), exclude_none=True)
    return GenerationRequest(model=card.name, image=Picture.from_bytes(picture), output_format=format, **values)


def to_upscale(body: UpscaleBody) -> Upscale:
    """For an upscaler. Raises InvalidRequest for a field that it would not look at."""
    for field in _OF_A_MODEL:
        if getattr(body, field) is not None:
            raise InvalidRequest(field, "needs a `model` of GET /v1/models, one that makes pictures larger")
    return Upscale(model=body.model) if body.scale is None else Upscale(scale=body.scale, model=body.model)


async def _drawing(service: Service, body: UpscaleBody, card: ModelCard, format: ImageFormat) -> GenerationRequest:
    return await asyncio.to_thread(to_request, body, card, await _picture(service, body), format)


async def _picture(service: Service, body: UpscaleBody) -> bytes:
    body = await links.resolved(body, service.pictures)
    return await asyncio.to_thread(requests.encoded_bytes, "image", body.image)


async def _kept(service: Service, job: Job, media_type: str) -> Response:
    """The answer of a job that enlarged, as it would have been at once."""
    if job.request["response"] == "url":
        return wire.json_response(await job_form.by_address(service.jobs, job))
    [output] = job.outputs
    names = ("format", "width", "height", "model")
    told = {name: output[name] for name in names}
    receipt_id = None if job.result is None else job.result.get("receipt_id")
    upscaled = Upscaled(data=await service.jobs.data(output["key"]), receipt_id=receipt_id, **told)
    if media_type != JSON:
        return _bytes(upscaled)
    image = {"index": 0, "format": upscaled.format, "width": upscaled.width, "height": upscaled.height}
    encoded = await wire.written(len(upscaled.data), lambda: wire.encode_base64(upscaled.data))
    return wire.json_response(job_form.upscaling(job, [image | {"base64": encoded}]))


def from_upscaled(upscaled: Upscaled, scale: float, total_s: float, url: str | None = None) -> dict[str, Any]:
    """The JSON answer, with the picture in base64 unless there is an address of it."""
    picture = {"base64": wire.encode_base64(upscaled.data)}
    if url is not None:
        picture = {"url": url, "sha256": hashlib.sha256(upscaled.data).hexdigest()}
    image = {"index": 0, "format": upscaled.format, "width": upscaled.width, "height": upscaled.height}
    return {
        "id": uuid.uuid4().hex,
        "created": int(time.time()),
        "receipt_id": upscaled.receipt_id,
        "model": upscaled.model,
        "images": [image | picture],
        "parameters": {"scale": scale},
        "timings": {"total": round(total_s, 4)},
        "warnings": list(upscaled.warnings),
    }


def _answer_as(accept: str, body: UpscaleBody) -> tuple[str, ImageFormat]:
    """The answer's media type and the picture's format. Raises NotAcceptable, or InvalidRequest for a contradiction."""
    asked = requests.canonical(body.output_format)
    if body.asynchronous is True:
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
        "x-warnings": str(len(upscaled.warnings)),
        "x-content-type-options": "nosniff",
    }
    if upscaled.receipt_id is not None:
        headers["x-receipt-id"] = upscaled.receipt_id
    return Response(upscaled.data, media_type=MEDIA_TYPES[upscaled.format], headers=headers)
