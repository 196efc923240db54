"""Heliograph's own API: `POST /v1/generate` and `GET /v1/models`."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Any, Literal, cast, get_args

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from app import metadata, wire
from app.dialects import _upscale
from app.errors import envelope
from app.service import Accepted, GenerationResult, ModelDescription, Service, StreamEvent
from models import limits
from models.errors import HeliographError, InvalidRequest
from models.events import Finished, Progress, Timings
from models.images import FORMATS, MEDIA_TYPES, ImageFormat, Picture
from models.limits import Range
from models.request import EffectiveRequest, GenerationRequest, Priority
from models.samplers import SAMPLERS

JSON = "application/json"
EVENTS = "text/event-stream"
STREAM_PREVIEW_EVERY = 5
OutputFormat = Literal["png", "jpeg", "jpg", "webp"]


def _within(range: Range, description: str) -> Any:
    """A number's range for the documentation; `resolve` is what checks it."""
    return Field(None, description=description, json_schema_extra={"minimum": range.low, "maximum": range.high})


class GenerateBody(BaseModel):
    """What to make. Only `prompt` is required; what is left out is decided by the model and told in the answer."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={"example": {"prompt": "a red circle on a blue background", "steps": 25, "seed": 7}},
    )

    model: str | None = Field(None, description="A name from GET /v1/models; the default model when left out")
    prompt: str = Field(description=f"At most {limits.PROMPT_CHARACTERS} characters")
    negative_prompt: str = Field("", description="What the picture should not show")
    width: int | None = _within(limits.SIDE, f"A multiple of {limits.SIDE_MULTIPLE}; the model's size when left out")
    height: int | None = _within(limits.SIDE, f"A multiple of {limits.SIDE_MULTIPLE}; the model's size when left out")
    steps: int | None = _within(limits.STEPS, "Denoising steps")
    guidance_scale: float | None = _within(limits.GUIDANCE_SCALE, "How closely to follow the prompt; 1 is not at all")
    guidance_rescale: float | None = _within(limits.GUIDANCE_RESCALE, "Against overexposure; 0 when left out")
    seed: int | None = _within(limits.SEED, "Picture i is the picture of seed + i; random when left out")
    samples: int | None = _within(limits.SAMPLES, "How many pictures; 1 when left out")
    sampler: str | None = Field(None, description=f"One of {', '.join(SAMPLERS)}, or a name people use elsewhere")
    schedule: str | None = Field(None, description="The sampler's spacing of noise levels")
    clip_skip: int | None = _within(limits.CLIP_SKIP, "Layers of the text encoder left out from the end")
    output_format: OutputFormat | None = Field(None, description="png when left out; jpg is jpeg")
    priority: Priority = Field("interactive", description="Batch work waits for interactive work")
    deadline_s: float | None = _within(limits.DEADLINE_S, "Seconds after which the picture is of no use")
    image: str | None = Field(None, description="PNG, JPEG or WebP to start from: base64 or a data URI")
    denoise_strength: float | None = _within(limits.DENOISE_STRENGTH, "1 ignores `image`, 0 returns it")
    stream: bool = Field(False, description="Answer with server-sent events: queued, progress, image, done or error")
    preview_every: int | None = _within(
        limits.PREVIEW_EVERY, f"A preview in every n-th progress event, 0 for none; {STREAM_PREVIEW_EVERY} in a stream"
    )


def to_request(body: GenerateBody, default_model: str) -> GenerationRequest:
    """The request in canonical form. Raises InvalidRequest for a picture that cannot be read."""
    plain = body.model_dump(exclude={"stream", "output_format", "image", "model"}, exclude_none=True)
    if body.preview_every is None:
        plain["preview_every"] = STREAM_PREVIEW_EVERY if body.stream else 0
    elif not body.stream:
        raise InvalidRequest("preview_every", 'needs "stream": true')
    return GenerationRequest(
        model=default_model if body.model is None else body.model,
        image=None if body.image is None else Picture.from_bytes(wire.decode_base64(body.image, "image")),
        output_format=_canonical(body.output_format),
        **plain,
    )


def from_result(result: GenerationResult) -> dict[str, Any]:
    """The JSON answer."""
    return {
        "id": result.id,
        "created": result.created,
        "model": result.request.model,
        "revision": result.revision,
        "images": [_image(image) for image in result.images],
        "parameters": parameters(result.request),
        "timings": _timings(result.timings, result.total_s),
        "warnings": list(result.warnings),
    }


def from_event(event: StreamEvent) -> bytes:
    """One server-sent event."""
    match event:
        case Accepted(request=request):
            values = {"id": event.id, "created": event.created, "model": request.model, "revision": event.revision}
            values |= {"waiting": event.waiting, "parameters": parameters(request)}
            return wire.server_sent_event("queued", values)
        case Progress(preview=preview):
            values = {field.name: getattr(event, field.name) for field in fields(event) if field.name != "preview"}
            if preview is not None:
                values["preview"] = {"format": "jpeg", "base64": wire.encode_base64(preview)}
            return wire.server_sent_event("progress", values)
        case Finished():
            return wire.server_sent_event("image", _image(event))
        case GenerationResult(images=images):
            values = from_result(event) | {"images": [{"index": i.index, "seed": i.seed} for i in images]}
            return wire.server_sent_event("done", values)


def from_model(model: ModelDescription) -> dict[str, Any]:
    """A model's entry in the list. `object`, `id` and the list's `data` are what OpenAI's clients look for."""
    card = model.card
    return {
        "id": card.name,
        "object": "model",
        "family": card.family,
        "state": model.state,
        "default": model.default,
        "tasks": list(card.tasks),
        "size": {"width": card.width, "height": card.height},
        "defaults": {
            "steps": card.steps,
            "guidance_scale": card.guidance_scale,
            "sampler": card.sampler,
            "schedule": card.schedule,
        },
        "samplers": {name: list(sampler.schedules) for name, sampler in SAMPLERS.items()},
        "output_formats": list(FORMATS),
        "limits": _limits() | {"max_pixels": card.max_pixels, "size_multiple": limits.SIDE_MULTIPLE},
    }


def parameters(request: EffectiveRequest) -> dict[str, Any]:
    """Every parameter as it was used; an input picture by its size."""
    hidden = {"model", "image", "mask", "adapters"}
    values = {f.name: getattr(request, f.name) for f in fields(request) if f.name not in hidden}
    if request.image is None:
        del values["denoise_strength"]
        return {"task": request.task} | values
    return {"task": request.task} | values | {"image": {"width": request.image.width, "height": request.image.height}}


def routes(service: Service) -> APIRouter:
    """The paths of this API."""
    router = APIRouter(prefix="/v1", tags=["native"])
    router.include_router(_upscale.routes(service))
    router.include_router(metadata.routes(service, GenerateBody))

    @router.post("/generate", summary="Make pictures", openapi_extra=_BODY_SCHEMA, responses=_ANSWERS)
    async def generate(request: Request) -> Response:
        body = await wire.read_json(request, GenerateBody)
        media_type = _media_type(request.headers.get("accept", ""), body)
        # Decoding a large picture takes a while: not on the loop that every other request shares.
        wanted = await asyncio.to_thread(to_request, body, service.default_model)
        if body.stream:
            return await wire.unless_disconnected(request, _stream(service, wanted))
        if media_type == JSON:
            return wire.json_response(from_result(await wire.unless_disconnected(request, service.generate(wanted))))
        wanted = _for_bytes(wanted, media_type)
        return _bytes(await wire.unless_disconnected(request, service.generate(wanted)))

    @router.get("/models", summary="The models and what each can do")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [from_model(model) for model in await service.models()]})

    @router.get("/models/{name}", summary="One model and what it can do")
    async def model(name: str) -> JSONResponse:
        return JSONResponse(from_model(await service.model(name)))

    return router


async def _stream(service: Service, wanted: GenerationRequest) -> Response:
    """Waits until a replica has taken the request on, so that a refusal is a status and not an event."""
    events = service.stream(wanted)
    return wire.EventStream(_events(await anext(events), events))


async def _events(first: StreamEvent, rest: AsyncGenerator[StreamEvent, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        try:
            yield from_event(first)
            async for event in rest:
                yield from_event(event)
        except HeliographError as error:
            yield wire.server_sent_event("error", envelope(error))


def _media_type(accept: str, body: GenerateBody) -> str:
    """What the answer will be, by Accept and `stream`. Raises NotAcceptable or InvalidRequest where they contradict."""
    if body.stream:  # clients that expect JSON in the events ask for JSON
        wire.choose_media_type(accept, (EVENTS, JSON))
        return EVENTS
    wanted = _canonical(body.output_format)
    images = (MEDIA_TYPES[wanted], *(kind for kind in MEDIA_TYPES.values() if kind != MEDIA_TYPES[wanted]))
    chosen = wire.choose_media_type(accept, (JSON, *images))
    if chosen == JSON:
        return JSON
    if body.samples is not None and body.samples > 1:
        raise InvalidRequest("samples", f"must be 1 with Accept: {chosen}; several pictures come as JSON")
    if body.output_format is not None and chosen != MEDIA_TYPES[wanted]:
        raise InvalidRequest("output_format", f"is {body.output_format}, but Accept asks for {chosen}")
    return chosen


def _for_bytes(wanted: GenerationRequest, media_type: str) -> GenerationRequest:
    return replace(wanted, output_format=next(f for f, kind in MEDIA_TYPES.items() if kind == media_type))


def _bytes(result: GenerationResult) -> Response:
    """The picture itself, with what is short enough to be a header."""
    image, request = result.images[0], result.request
    headers = {
        "x-id": result.id,
        "x-model": request.model,
        "x-revision": result.revision,
        "x-seed": str(image.seed),
        "x-size": f"{image.width}x{image.height}",
        "x-steps": str(request.steps),
        "x-guidance-scale": str(request.guidance_scale),
        "x-sampler": request.sampler,
        "x-schedule": request.schedule,
        "x-warnings": str(len(result.warnings)),
        "x-content-type-options": "nosniff",
    }
    return Response(image.data, media_type=MEDIA_TYPES[image.format], headers=headers)


def _canonical(format: OutputFormat | None) -> ImageFormat:
    return "jpeg" if format == "jpg" else cast(ImageFormat, format or "png")


def _image(image: Finished) -> dict[str, Any]:
    values = {"index": image.index, "seed": image.seed, "format": image.format}
    return values | {"width": image.width, "height": image.height, "base64": wire.encode_base64(image.data)}


def _timings(timings: Timings, total_s: float) -> dict[str, float]:
    """Seconds, by stage and from end to end."""
    stages = {field.name.removesuffix("_s"): round(getattr(timings, field.name), 4) for field in fields(timings)}
    return stages | {"total": round(total_s, 4)}


def _limits() -> dict[str, Any]:
    return {
        "side": [limits.SIDE.low, limits.SIDE.high],
        "steps": [limits.STEPS.low, limits.STEPS.high],
        "guidance_scale": [limits.GUIDANCE_SCALE.low, limits.GUIDANCE_SCALE.high],
        "seed": [limits.SEED.low, limits.SEED.high],
        "samples": [limits.SAMPLES.low, limits.SAMPLES.high],
        "clip_skip": [limits.CLIP_SKIP.low, limits.CLIP_SKIP.high],
        "prompt_characters": limits.PROMPT_CHARACTERS,
    }


_BODY_SCHEMA = {"requestBody": {"required": True, "content": {JSON: {"schema": GenerateBody.model_json_schema()}}}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The pictures: JSON with base64, or by `Accept` the bytes of one, or by `stream` events",
        "content": {kind: {} for kind in (JSON, EVENTS, *MEDIA_TYPES.values())},
    },
    **{
        status: {"description": meaning, "content": {JSON: {}}}
        for status, meaning in {
            400: "The body is not JSON",
            404: "No such model",
            413: "The body is too large",
            422: "A field is wrong; `field` says which",
            429: "Too much work is waiting; see Retry-After",
            503: "No replica could do it just now; send it again",
            504: "Not finished before the deadline",
        }.items()
    },
}
assert set(get_args(ImageFormat)) == set(MEDIA_TYPES)
