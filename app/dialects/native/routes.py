"""The paths of this API, and what each does: read, convert, ask the service, answer."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from app import links, metadata, wire
from app.auth import scope
from app.dialects.native import (
    answering,
    answers,
    batches,
    experiments,
    forms,
    jobs,
    receipts,
    requests,
    upscale,
    webhooks,
)
from app.dialects.native.bodies import DrawBody, GenerateBody, OutpaintBody, VariationsBody
from app.dialects.native.schemas import ANSWERS, EVENTS, JSON, body_schema
from app.service import Service
from models.errors import InvalidRequest
from models.images import MEDIA_TYPES
from models.request import GenerationRequest

Body = TypeVar("Body", bound=DrawBody)
ToRequest = Callable[[Body, str], GenerationRequest]


def routes(service: Service) -> APIRouter:
    """The paths of this API; a job is there without the prefix too."""
    router = APIRouter(prefix="/v1", tags=["native"])
    router.include_router(metadata.routes(service, GenerateBody))
    _add_generate(router, service)
    _add_forms(router, service)
    upscale.add(router, service)
    receipts.add(router, service)
    experiments.add(router, service)
    _add_lists(router, service)
    _add_requests(router, service)
    jobs.add(router, service)
    batches.add(router, service)
    router.include_router(webhooks.routes(service))
    outer = APIRouter(tags=["native"])
    outer.include_router(router)

    @outer.get("/jobs/{id}", include_in_schema=False, openapi_extra=scope("jobs"))
    async def job(request: Request, id: str) -> Response:
        return await jobs.one(service.jobs, request, id)

    return outer


def _add_generate(router: APIRouter, service: Service) -> None:
    extra = body_schema(GenerateBody, form=False)

    @router.post("/generate", summary="Make pictures", openapi_extra=extra, responses=ANSWERS)
    async def generate(request: Request) -> Response:
        return await _draw(
            request, service, await wire.read_json(request, GenerateBody), requests.to_request, "generate"
        )


def _add_forms(router: APIRouter, service: Service) -> None:
    """The endpoints that start from a picture: as JSON, or as a form with files."""

    def add(path: str, body: type[Body], to_request: ToRequest[Body], summary: str) -> None:
        extra = body_schema(body, form=True)

        @router.post(path, summary=summary, openapi_extra=extra, responses=ANSWERS, name=path.strip("/"))
        async def draw(request: Request) -> Response:
            return await _draw(request, service, await forms.read(request, body), to_request, path.strip("/"))

    add("/img2img", GenerateBody, requests.img2img, "Make a picture from a picture")
    add("/inpaint", GenerateBody, requests.inpaint, "Draw a part of a picture anew")
    add("/outpaint", OutpaintBody, requests.outpaint, "Continue a picture beyond its borders")
    add("/variations", VariationsBody, requests.variations, "Make pictures like one that is there")


def _add_lists(router: APIRouter, service: Service) -> None:
    @router.get("/models", summary="The models and what each can do")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [answers.from_model(m) for m in await service.models()]})

    @router.get("/models/{name}", summary="One model and what it can do")
    async def model(name: str) -> JSONResponse:
        return JSONResponse(answers.from_model(await service.model(name)))

    @router.get("/samplers", summary="The samplers, their other names and their schedules")
    async def samplers() -> JSONResponse:
        return JSONResponse(answers.samplers())

    @router.get("/adapters", summary="The LoRAs, ControlNets, embeddings and upscalers, and the models they fit")
    async def adapters() -> JSONResponse:
        found = await asyncio.to_thread(service.adapters)
        return JSONResponse({"object": "list", "data": [answers.from_adapter(a) for a in found]})


def _add_requests(router: APIRouter, service: Service) -> None:
    @router.post("/requests/{id}/accept", summary="End a running request with its present estimate", status_code=202)
    async def accept(id: str) -> JSONResponse:
        await service.accept(id)
        return JSONResponse({"id": id}, 202)

    @router.post("/requests/{id}/cancel", summary="End a running request without its pictures", status_code=202)
    async def cancel(id: str) -> JSONResponse:
        await service.cancel(id)
        return JSONResponse({"id": id}, 202)


async def _draw(request: Request, service: Service, body: Body, to_request: ToRequest[Body], kind: str) -> Response:
    """What a body asks for, in the form that `async`, `stream` and Accept ask for."""
    media_type = _media_type(request.headers.get("accept", ""), body)
    wanted = partial(_wanted, service, body, to_request, media_type)
    return await answering.answer(request, service, body, kind, media_type, wanted)


async def _wanted(service: Service, body: Body, to_request: ToRequest[Body], media_type: str) -> GenerationRequest:
    body = await links.resolved(body, service.pictures)
    # Decoding a large picture takes a while: not on the loop that every other request shares.
    wanted = await asyncio.to_thread(to_request, body, service.default_model)
    if media_type in (EVENTS, JSON):
        return wanted
    return replace(wanted, output_format=next(f for f, kind in MEDIA_TYPES.items() if kind == media_type))


def _media_type(accept: str, body: DrawBody) -> str:
    """What the answer will be, by Accept, `async` and `stream`.

    Raises NotAcceptable or InvalidRequest where they contradict.
    """
    if body.stream:  # clients that expect JSON in the events ask for JSON
        wire.choose_media_type(accept, (EVENTS, JSON))
        return EVENTS
    if body.asynchronous:
        return wire.choose_media_type(accept, (JSON,))
    wanted = requests.canonical(body.output_format)
    images = (MEDIA_TYPES[wanted], *(kind for kind in MEDIA_TYPES.values() if kind != MEDIA_TYPES[wanted]))
    chosen = wire.choose_media_type(accept, (JSON, *images))
    if chosen == JSON:
        return JSON
    if body.samples is not None and body.samples > 1:
        raise InvalidRequest("samples", f"must be 1 with Accept: {chosen}; several pictures come as JSON")
    if body.output_format is not None and chosen != MEDIA_TYPES[wanted]:
        raise InvalidRequest("output_format", f"is {body.output_format}, but Accept asks for {chosen}")
    return chosen
