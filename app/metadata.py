"""`POST /v1/metadata`: how a picture was made, read out of the picture."""

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, ValidationError

from app import links, wire
from app.service import Service
from models.errors import InvalidRequest, NotFound
from models.metadata import Metadata, read


class MetadataBody(BaseModel):
    """A picture in JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str


def routes(service: Service, request_body: type[BaseModel]) -> APIRouter:
    """The path. `request_body` is what the parameters are to be posted as, so what it has no field for is left out."""
    router = APIRouter()

    @router.post("/metadata", summary="How a picture was made, out of the picture", openapi_extra=_BODY)
    async def metadata(request: Request) -> Response:
        given = await _given(request)
        encoded = await wire.unless_disconnected(request, _picture(given, service)) if isinstance(given, str) else given
        found = await asyncio.to_thread(read, encoded)
        return wire.json_response(_answer(found, service, request_body))

    return router


async def _given(request: Request) -> bytes | str:
    """The picture of a body that is one, or has one as a multipart file; or what JSON or a form's text says of it.

    What a body is, it says itself: `curl --data-binary` calls everything a form.
    """
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        fields, files = await wire.read_multipart(request)
        given = [*files.get("image", []), *fields.values()]
        if {*fields, *files} != {"image"} or len(given) != 1:
            raise InvalidRequest("image", "must be the one and only part of the body")
        return given[0]
    body = await request.body()
    if body[:64].lstrip()[:1] in (b"{", b"["):
        return (await wire.read_json(request, MetadataBody)).image
    return body


async def _picture(text: str, service: Service) -> bytes:
    if isinstance(links.link_or_text(text), links.Link):
        return (await service.pictures({"image": text}))["image"]
    return wire.decode_base64(text, "image")


def _answer(found: Metadata, service: Service, request_body: type[BaseModel]) -> dict[str, Any]:
    values = asdict(found)
    parameters, warnings = values["parameters"], list(found.warnings)
    for name, complaint in _complaints(parameters, service, request_body).items():
        warnings.append(f"`{name}` is left out: {complaint}")
        del parameters[name]
    return values | {"warnings": warnings}


def _complaints(parameters: dict[str, Any], service: Service, request_body: type[BaseModel]) -> dict[str, str]:
    """What is wrong with which parameter, in the words of the body that they are for."""
    complaints: dict[str, str] = {}
    try:
        request_body.model_validate(parameters)
    except ValidationError as wrong:
        faults = wrong.errors(include_url=False)
        complaints = {str(fault["loc"][0]): fault["msg"] for fault in faults if {*fault["loc"][:1]} & {*parameters}}
    if "model" in parameters and "model" not in complaints:
        try:
            service.card(parameters["model"])
        except NotFound as missing:
            complaints["model"] = missing.message
    return complaints


_PICTURE = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **{f"image/{kind}": _PICTURE for kind in ("png", "jpeg", "webp", "avif")},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
            "application/json": {"schema": MetadataBody.model_json_schema()},
        },
    }
}
