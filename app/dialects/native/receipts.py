"""`GET /v1/receipts/{id}` and `POST /v1/replay`: how a result came about, and whether the same comes of it again."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from app import wire
from app.dialects.native import answers
from app.dialects.native.bodies import Wire
from app.dialects.native.schemas import body_schema
from app.keys.caller import current
from app.replay import replay
from app.results.results import Result
from app.service import Service
from models.errors import InvalidRequest, NotFound, Unavailable


class ReplayBody(Wire):
    """Which result to draw again."""

    receipt_id: str = Field(description="The `receipt_id` of an answer")


def add(router: APIRouter, service: Service) -> None:
    """Adds the paths."""

    @router.get("/receipts/{id}", summary="How a result came about")
    async def receipt(id: str) -> JSONResponse:
        found = await service.results.get(current.get().id, id)
        return JSONResponse(answers.from_receipt(found.receipt, await _urls(service, found)))

    extra = body_schema(ReplayBody, form=False)

    @router.post("/replay", summary="Draw a result again and compare", openapi_extra=extra)
    async def draw_again(request: Request) -> Response:
        if "idempotency-key" in request.headers:
            raise InvalidRequest("Idempotency-Key", "is not taken here: a replay is no job, and draws each time")
        id = (await wire.read_json(request, ReplayBody)).receipt_id
        drawn = await wire.unless_disconnected(request, replay(service, current.get().id, id))
        size = sum(len(one.image.data) for one in drawn.images)
        return await wire.written(size, lambda: wire.json_response(answers.from_replay(id, drawn)))


async def _urls(service: Service, result: Result) -> tuple[str, ...]:
    """Addresses of the pictures, none where they are not there: the receipt is good without them."""
    try:
        return await service.results.addresses(result.keys, result.expires_s) if result.keys else ()
    except (NotFound, Unavailable):
        return ()
