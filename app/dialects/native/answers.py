"""What this API answers: pictures, events, models, samplers, adapters."""

import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from typing import Any

from fastapi.responses import Response

from app import wire
from app.dialects.native import visiting
from app.dialects.native.schemas import JSON
from app.drawing import Accepted, GenerationResult, StreamEvent
from app.errors import envelope
from app.replay import Replay
from app.service import AdapterDescription, ModelDescription
from models import limits
from models.errors import HeliographError
from models.events import Finished, Progress, Timings
from models.images import FORMATS, MEDIA_TYPES, Picture
from models.limits import Range
from models.request import EffectiveRequest
from models.samplers import SAMPLERS, SCHEDULE_LABELS, SCHEDULES
from models.upscaling import Upscaling

_OF_A_DRAWN_PICTURE = {"denoise_strength"}
_OF_A_MASK = {"mask_blur", "mask_grow", "mask_fill", "mask_region", "mask_padding", "paste_back"}


def from_result(result: GenerationResult, urls: Sequence[str] | None = None) -> dict[str, Any]:
    """The JSON answer, with the pictures in base64 unless there are addresses of them."""
    if urls is None:
        return answer(result, [_image(image) for image in result.images])
    placed = zip(result.images, urls, strict=True)
    return answer(result, [_described(image) | {"url": url, "sha256": _sha256(image)} for image, url in placed])


def cache_headers(cached: bool) -> dict[str, str]:
    """Whether the pictures were there before they were asked for."""
    return {"x-cache": "hit" if cached else "miss"}


def answer(result: GenerationResult, images: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON answer, with these entries for its pictures."""
    return {
        "id": result.id,
        "created": result.created,
        "receipt_id": result.receipt_id,
        "cached": result.cached,
        "model": result.request.model,
        "revision": result.revision,
        "images": images,
        "parameters": parameters(result.request),
        "prompts": {field: asdict(report) for field, report in result.images[0].prompts.items()},
        "timings": _timings(result.timings, result.total_s),
        "warnings": list(result.warnings),
        **visiting.told(visiting.arms(result.request)),
    }


def from_event(event: StreamEvent) -> bytes:
    """One server-sent event."""
    match event:
        case Accepted(request=request):
            values = {"id": event.id, "created": event.created, "model": request.model, "revision": event.revision}
            values |= {"waiting": event.waiting, "parameters": parameters(request)}
            values |= visiting.told(visiting.arms(request))
            return wire.server_sent_event("queued", values)
        case Progress(preview=preview):
            values = {field.name: getattr(event, field.name) for field in fields(event) if field.name != "preview"}
            if preview is not None:
                values["preview"] = {"format": "jpeg", "base64": wire.encode_base64(preview)}
            return wire.server_sent_event("progress", values)
        case Finished():
            return wire.server_sent_event("image", _image(event))
        case GenerationResult(images=images):
            told = [{"index": image.index, "seed": image.seed} for image in images]  # each has had its event
            return wire.server_sent_event("done", answer(event, told))


async def from_events(first: StreamEvent, rest: AsyncGenerator[StreamEvent, None]) -> AsyncGenerator[bytes, None]:
    """The events of a stream; a failure is the last of them."""
    async with aclosing(rest):
        try:
            yield from_event(first)
            async for event in rest:
                size = len(event.data) if isinstance(event, Finished) else 0
                yield await wire.written(size, partial(from_event, event))
        except HeliographError as error:
            yield wire.server_sent_event("error", envelope(error))


async def response(result: GenerationResult, media_type: str, urls: Sequence[str] | None = None) -> Response:
    """A result as JSON, with the addresses of its pictures where there are any, or as the picture itself."""
    if media_type != JSON:
        return _picture(result)
    size = sum(len(image.data) for image in result.images)
    headers = cache_headers(result.cached) | visiting.headers(visiting.arms(result.request))
    return await wire.written(size, lambda: wire.json_response(from_result(result, urls), headers))


def _picture(result: GenerationResult) -> Response:
    """With what is short enough to be a header."""
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
    if result.receipt_id is not None:
        headers["x-receipt-id"] = result.receipt_id
    headers |= cache_headers(result.cached) | visiting.headers(visiting.arms(request))
    return Response(image.data, media_type=MEDIA_TYPES[image.format], headers=headers)


def from_receipt(receipt: Mapping[str, Any], urls: Sequence[str]) -> dict[str, Any]:
    """A receipt, with the addresses of its pictures where they are kept."""
    if not urls:
        return dict(receipt)
    images = [image | {"url": url} for image, url in zip(receipt["images"], urls, strict=True)]
    return {**receipt, "images": images}


def from_replay(receipt_id: str, replay: Replay) -> dict[str, Any]:
    """What came of drawing again; `max_difference` is null where the first pictures are no longer there to compare."""
    images = [
        _image(one.image) | {"identical": one.identical, "max_difference": one.max_difference} for one in replay.images
    ]
    known = [one.max_difference for one in replay.images if one.max_difference is not None]
    return {
        "receipt_id": receipt_id,
        "identical": all(one.identical for one in replay.images),
        "max_difference": max(known) if len(known) == len(images) else None,
        "changed": list(replay.changed),
        "replay_receipt_id": replay.result.receipt_id,
        "images": images,
    }


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
        **({"upscaling": _upscaling(card.upscaling, card.max_pixels)} if card.upscaling else {}),
        **({"guidance_input": True} if card.guidance_input else {}),
        "size": {"width": card.width, "height": card.height},
        "defaults": {
            "steps": card.steps,
            "guidance_scale": card.guidance_scale,
            "sampler": card.sampler,
            "schedule": card.schedule,
            "deep_cache": card.deep_cache,
        },
        "samplers": {name: list(sampler.schedules) for name, sampler in SAMPLERS.items()},
        "output_formats": list(FORMATS),
        "limits": _limits() | {"max_pixels": card.max_pixels},
    }


def _upscaling(upscaling: Upscaling, max_pixels: int) -> dict[str, Any]:
    return {
        "scale": upscaling.scale,
        "noise_level": upscaling.noise_level,
        "max_input_pixels": upscaling.most(max_pixels),
    }


def from_adapter(adapter: AdapterDescription) -> dict[str, Any]:
    """An adapter's entry in the list."""
    return asdict(adapter) | {"models": list(adapter.models)}


def samplers() -> dict[str, Any]:
    """Every sampler with the names that people use for it elsewhere, and every schedule."""
    entries = [
        {
            "name": name,
            "label": sampler.label,
            "aliases": list(sampler.aliases),
            "schedules": list(sampler.schedules),
        }
        for name, sampler in SAMPLERS.items()
    ]
    schedules = [{"name": name, "label": SCHEDULE_LABELS[name]} for name in SCHEDULES]
    return {"object": "list", "data": entries, "schedules": schedules}


def parameters(request: EffectiveRequest) -> dict[str, Any]:
    """Every parameter that plays a part, as it was used; pictures by their size."""
    idle = {"model", "experiments", "guidance_input"}
    if request.task in ("txt2img", "upscale"):
        idle |= _OF_A_DRAWN_PICTURE
    if request.task != "inpaint":
        idle |= _OF_A_MASK
    values = {field.name: getattr(request, field.name) for field in fields(request) if field.name not in idle}
    return {"task": request.task} | {name: _told(value) for name, value in values.items() if _is_given(value)}


def _is_given(value: Any) -> bool:
    return value is not None and value != ()


def _told(value: Any) -> Any:
    if isinstance(value, Picture):
        return {"width": value.width, "height": value.height}
    if isinstance(value, tuple):
        return [_told(item) for item in value]
    if is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: _told(part) for name, part in parts.items() if _is_given(part)}
    return value


def _image(image: Finished) -> dict[str, Any]:
    return _described(image) | {"base64": wire.encode_base64(image.data)}


def _described(image: Finished) -> dict[str, Any]:
    values = {"index": image.index, "seed": image.seed, "format": image.format}
    ended = {} if image.stop_at_step is None else {"stop_at_step": image.stop_at_step}
    return values | {"width": image.width, "height": image.height} | ended


def _sha256(image: Finished) -> str:
    return hashlib.sha256(image.data).hexdigest()


def _timings(timings: Timings, total_s: float) -> dict[str, float]:
    """Seconds, by stage that there was and from end to end."""
    stages = {field.name.removesuffix("_s"): getattr(timings, field.name) for field in fields(timings)}
    return {stage: round(spent, 4) for stage, spent in (stages | {"total": total_s}).items() if spent is not None}


def _limits() -> dict[str, Any]:
    """Every range that a request's fields have, and the two limits that are no ranges."""
    ranges = {name.lower(): [range.low, range.high] for name, range in vars(limits).items() if isinstance(range, Range)}
    return ranges | {"size_multiple": limits.SIDE_MULTIPLE, "prompt_characters": limits.PROMPT_CHARACTERS}
