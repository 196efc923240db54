"""Heliograph's own API, continued: `POST /v1/upscale` makes a picture larger, `GET /v1/upscalers` tells by whom."""

import asyncio
import time
import uuid
from typing import Any, Literal, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from app import wire
from app.events import Upscaled
from app.service import Service
from models import limits
from models.errors import InvalidRequest
from models.images import MEDIA_TYPES, ImageFormat
from models.parts import Upscale

JSON = "application/json"
FORM = "multipart/form-data"


class UpscaleForm(BaseModel):
    """How to make a picture larger, as a form beside the file `image`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    scale: float = Field(
        2.0,
        description="How many times as wide and as high; fractions are allowed",
        json_schema_extra={"minimum": limits.UPSCALE.low, "maximum": limits.UPSCALE.high},
    )
    model: str | None = Field(None, description="A name from GET /v1/upscalers; the default one when left out")
    output_format: Literal["png", "jpeg", "jpg", "webp"] | None = Field(None, description="png when left out")


class UpscaleBody(UpscaleForm):
    """The same as JSON."""

    image: str = Field(description="PNG, JPEG or WebP: base64 or a data URI")


def routes(service: Service) -> APIRouter:
    """The paths of this part."""
    router = APIRouter()

    @router.post("/upscale", summary="Make a picture larger", openapi_extra=_BODY_SCHEMA, responses=_ANSWERS)
    async def upscale(request: Request) -> Response:
        started = time.monotonic()
        form, picture = await _read(request)
        media_type, format = _answer_as(request.headers.get("accept", ""), form)
        wanted = Upscale(scale=form.scale, model=form.model)
        upscaled = await wire.unless_disconnected(request, service.upscale(picture, wanted, format))
        if media_type != JSON:
            return _bytes(upscaled)
        return wire.json_response(from_upscaled(upscaled, form.scale, time.monotonic() - started))

    @router.get("/upscalers", summary="The upscalers and what they take and give")
    async def upscalers() -> JSONResponse:
        card, state = service.upscaler, await service.upscaler_state()
        entries = [
            {"id": name, "object": "upscaler", "state": state, "default": name == card.default} for name in card.names
        ]
        allowed = {"scale": [limits.UPSCALE.low, limits.UPSCALE.high]}
        pixels = {"max_input_pixels": card.max_input_pixels, "max_output_pixels": card.max_output_pixels}
        return JSONResponse({"object": "list", "data": entries, "limits": allowed | pixels})

    return router


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


async def _read(request: Request) -> tuple[UpscaleForm, bytes]:
    """A form where the body is one, else JSON."""
    if request.headers.get("content-type", "").lower().startswith(FORM):
        fields, files = await wire.read_multipart(request)
        form = wire.read_fields(fields, UpscaleForm)
        given = files.pop("image", [])
        if files or len(given) != 1:
            raise InvalidRequest("image", "must be the one and only file of the form, with a filename")
        return form, given[0]
    body = await wire.read_json(request, UpscaleBody)
    return body, await asyncio.to_thread(wire.decode_base64, body.image, "image")


def _answer_as(accept: str, form: UpscaleForm) -> tuple[str, ImageFormat]:
    """The answer's media type and the picture's format. Raises NotAcceptable, or InvalidRequest for a contradiction."""
    asked = "jpeg" if form.output_format == "jpg" else cast(ImageFormat, form.output_format or "png")
    first = MEDIA_TYPES[asked]
    chosen = wire.choose_media_type(accept, (JSON, first, *(kind for kind in MEDIA_TYPES.values() if kind != first)))
    if chosen == JSON:
        return JSON, asked
    if form.output_format is not None and chosen != first:
        raise InvalidRequest("output_format", f"is {form.output_format}, but Accept asks for {chosen}")
    return chosen, next(format for format, kind in MEDIA_TYPES.items() if kind == chosen)


def _bytes(upscaled: Upscaled) -> Response:
    """The picture itself, with what is short enough to be a header."""
    headers = {
        "x-model": upscaled.model,
        "x-size": f"{upscaled.width}x{upscaled.height}",
        "x-content-type-options": "nosniff",
    }
    return Response(upscaled.data, media_type=MEDIA_TYPES[upscaled.format], headers=headers)


def _form_schema() -> dict[str, Any]:
    schema = UpscaleForm.model_json_schema()
    schema["properties"]["image"] = {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP"}
    return schema | {"required": ["image"]}


_BODY_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {JSON: {"schema": UpscaleBody.model_json_schema()}, FORM: {"schema": _form_schema()}},
    }
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture: JSON with base64, or by `Accept` its bytes",
        "content": {kind: {} for kind in (JSON, *MEDIA_TYPES.values())},
    },
    **{
        status: {"description": meaning, "content": {JSON: {}}}
        for status, meaning in {
            400: "The body is neither JSON nor a form",
            404: "No such upscaler",
            413: "The body is too large",
            422: "A field is wrong; `field` says which",
            429: "Too many pictures wait; see Retry-After",
            503: "The upscaler could not do it just now; send it again",
            504: "Not enlarged in time",
        }.items()
    },
}
