"""What a caller can do about its own webhooks: the secrets that sign them, addresses switched off, dead letters."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from app import wire
from app.auth import scope
from app.dialects.native.bodies import Wire
from app.dialects.native.job_form import of_row
from app.dialects.native.schemas import body_schema
from app.jobs.endpoints import LONGEST_OVERLAP_S, OVERLAP_S
from app.jobs.outbox import PAGE_LIMIT, DeadLetter
from app.service import Service
from app.webhooks.payload import payload_of

payload = payload_of(of_row)  # what webhooks about jobs say

_JOBS = scope("jobs")
_NEVER_KEPT = {"cache-control": "no-store"}


class _Query(BaseModel):
    """What may stand after the path's question mark: text, read as what it should be."""

    model_config = ConfigDict(extra="forbid")


class SecretQuery(_Query):
    """Whose secret."""

    url: str = Field("", description="An address with a secret of its own; that of all others when left out")


class DeadQuery(_Query):
    """Which page."""

    cursor: str = Field("", description="The `next` of an earlier page")
    limit: int = Field(50, description=f"How many; 1 to {PAGE_LIMIT}")


class RotateBody(Wire):
    """Which secret to replace, and how long the old one still signs."""

    url: str | None = Field(None, description="The address with a secret of its own; all others when left out")
    overlap_s: float = Field(OVERLAP_S, description=f"Seconds that both sign; 0 to {LONGEST_OVERLAP_S:.0f}")


class EnableBody(Wire):
    """What to switch on again."""

    url: str = Field(description="The `webhook_url` that answered 410")


def routes(service: Service) -> APIRouter:
    """The paths, for the API's prefix. Each concerns the caller's own webhooks: others' are 404."""
    router = APIRouter(prefix="/webhooks")
    _add_secrets(router, service)
    _add_dead_letters(router, service)
    return router


def _add_secrets(router: APIRouter, service: Service) -> None:
    rotating, enabling = (_JOBS | body_schema(body, form=False) for body in (RotateBody, EnableBody))

    @router.get("/secret", summary="The newest secret of your webhooks", openapi_extra=_JOBS | _parameters(SecretQuery))
    async def secret(request: Request) -> JSONResponse:
        query = wire.validate(dict(request.query_params), SecretQuery)
        found = await service.outbox.secret(_owner(request), query.url)
        return JSONResponse({"url": query.url or None, "secret": found}, headers=_NEVER_KEPT)

    @router.post("/rotate", summary="A new secret; for a while both sign", openapi_extra=rotating)
    async def rotate(request: Request) -> JSONResponse:
        body = await wire.read_json(request, RotateBody)
        fresh = await service.outbox.rotate(_owner(request), body.url or "", body.overlap_s)
        return JSONResponse({"url": body.url, "secret": fresh, "overlap_s": body.overlap_s}, headers=_NEVER_KEPT)

    @router.post("/enable", summary="Send again to an address that answered 410", openapi_extra=enabling)
    async def enable(request: Request) -> JSONResponse:
        body = await wire.read_json(request, EnableBody)
        await service.outbox.enable(_owner(request), body.url)
        return JSONResponse({"url": body.url, "enabled": True})


def _add_dead_letters(router: APIRouter, service: Service) -> None:
    @router.get("/dead", summary="Your webhooks that nobody took", openapi_extra=_JOBS | _parameters(DeadQuery))
    async def dead(request: Request) -> JSONResponse:
        query = wire.validate(dict(request.query_params), DeadQuery)
        letters = await service.outbox.dead(_owner(request), query.cursor, query.limit)
        following = letters[-1].id if len(letters) == query.limit else None
        return JSONResponse({"dead": [from_letter(letter) for letter in letters], "next": following})

    @router.post("/dead/{id}/replay", summary="Send a dead letter again", status_code=202, openapi_extra=_JOBS)
    async def replay(request: Request, id: str) -> JSONResponse:
        await service.outbox.replay(id, _owner(request))
        return JSONResponse({"id": id, "status": "pending"}, 202)


def from_letter(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter as it is told. Whose it is, the caller knows."""
    return {name: value for name, value in asdict(letter).items() if name != "owner"}


def _owner(request: Request) -> str:
    return request.state.caller.id


def _parameters(query: type[_Query]) -> dict[str, Any]:
    """A query in the API's description."""
    schema = query.model_json_schema()["properties"]
    return {"parameters": [{"name": name, "in": "query", "schema": part} for name, part in schema.items()]}
