"""Between bytes and values: strict JSON in, negotiated media types and server-sent events out, clients that leave."""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any, TypeVar, get_args

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app import multipart
from app.errors import MalformedBody, NotAcceptable
from models.errors import Cancelled, InvalidRequest

Body = TypeVar("Body", bound=BaseModel)
Answer = TypeVar("Answer")
Written = TypeVar("Written")

MAX_PARTS = 64  # of a multipart body
MAX_FIELD_BYTES = 1024 * 1024  # of a text field in it
LARGE_BYTES = 256 * 1024  # what takes longer than half a millisecond to put into JSON
_PIECE_BYTES = 3 * LARGE_BYTES  # of base64: threes, so that pieces put together are one text


async def read_json(request: Request, body: type[Body]) -> Body:
    """The request's body as a wire model, whatever its content-type says: a type never chooses a decoder here.

    orjson because it refuses NaN, lone surrogates and bottomless nesting, which the standard library lets through.
    """
    try:
        values = orjson.loads(await request.body())
    except orjson.JSONDecodeError as malformed:
        raise MalformedBody("body", f"is not valid JSON: {malformed}") from malformed
    if not isinstance(values, dict):
        raise MalformedBody("body", "must be a JSON object")
    return validate(values, body)


def validate(values: dict[str, Any], body: type[Body]) -> Body:
    """The wire model of the values. Raises InvalidRequest for the first fault, naming a field as `controls.0.name`."""
    try:
        return body.model_validate(values)
    except ValidationError as wrong:
        raise _invalid(wrong, body) from wrong


async def read_multipart(
    request: Request, max_parts: int = MAX_PARTS, max_field_bytes: int = MAX_FIELD_BYTES
) -> multipart.Form:
    """The text fields and the files of a multipart/form-data body. Raises what multipart.parse raises."""
    body, kind = await request.body(), request.headers.get("content-type", "")
    return await asyncio.to_thread(multipart.parse, body, kind, max_parts, max_field_bytes)


def _invalid(wrong: ValidationError, body: type[BaseModel]) -> InvalidRequest:
    """The first fault, said in terms of the field."""
    fault = wrong.errors(include_url=False)[0]
    field = ".".join(str(part) for part in fault["loc"]) or "body"
    match fault["type"]:
        case "extra_forbidden":
            known = _model_at(body, fault["loc"][:-1]).model_fields
            names = (field.alias or name for name, field in known.items())
            message = f"unknown field; the fields are: {', '.join(names)}"
        case "missing":
            message = "is required"
        case _:
            message = fault["msg"]
    return InvalidRequest(field, message)


def _model_at(body: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The wire model that stands at a path inside another one."""
    for name in (part for part in path if isinstance(part, str)):
        body = next(_models_in(body.model_fields[name].annotation))
    return body


def _models_in(kind: Any) -> Iterator[type[BaseModel]]:
    """The wire models of which a type is made: those of `list[ControlPart] | None`, say."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from _models_in(part)


def decode_base64(text: str, field: str) -> bytes:
    """The bytes of a base64 text, bare or as a data URI. Raises InvalidRequest naming the field."""
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise InvalidRequest(field, "must be a data URI in base64")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as malformed:
        raise InvalidRequest(field, "must be a picture: base64, a data URI or an http(s) address") from malformed


def encode_base64(data: bytes) -> str:
    """In pieces: in a thread, one that is large would not let the others run before it is done."""
    pieces = (base64.b64encode(data[at : at + _PIECE_BYTES]) for at in range(0, len(data), _PIECE_BYTES))
    return b"".join(pieces).decode("ascii")


async def written(size: int, write: Callable[[], Written]) -> Written:
    """What `write` makes of pictures of `size` bytes: of large ones in a thread, since the loop is everybody's."""
    return write() if size <= LARGE_BYTES else await asyncio.to_thread(write)


def number(field: str, text: str) -> int:
    """A whole number in a query or a header. Raises InvalidRequest naming the field."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidRequest(field, f"must be a whole number, not {text[:40]!r}")
    return int(text)


def json_response(values: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(orjson.dumps(values), status, media_type="application/json", headers=dict(headers or {}))


def choose_media_type(accept: str, offered: tuple[str, ...]) -> str:
    """The offered type that an Accept header likes best, the first of equals; no header likes anything.

    Raises NotAcceptable where it likes none (RFC 9110, 12.5.1).
    """
    ranges = [_media_range(part) for part in accept.split(",") if part.strip()]
    if not ranges:
        return offered[0]
    liking = {kind: _liking(kind, ranges) for kind in offered}
    best = max(offered, key=lambda kind: liking[kind])  # max keeps the first of equals
    if not liking[best]:
        raise NotAcceptable("Accept", f"asks for {accept!r}; there are: {', '.join(offered)}")
    return best


def _media_range(part: str) -> tuple[str, float]:
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
    try:
        return kind, float(quality)
    except ValueError as malformed:
        raise NotAcceptable("Accept", f"has a quality that is no number: {quality!r}") from malformed


def _liking(kind: str, ranges: list[tuple[str, float]]) -> float:
    """The quality of the most specific range that fits."""
    for name in (kind, kind.split("/")[0] + "/*", "*/*"):
        fitting = [quality for range, quality in ranges if range == name]
        if fitting:
            return max(fitting)
    return 0.0


async def unless_disconnected(request: Request, work: Awaitable[Answer]) -> Answer:
    """Does the work while the client is there, and cancels it when the client goes.

    Serve cancels a handler whose client has gone too, unless a header that anyone may send asks it not to.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client went away")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def server_sent_event(name: str, values: Any, id: int | None = None) -> bytes:
    """One event; JSON has no raw newlines, so one data line holds it (WHATWG HTML, 9.2).

    A client that comes back tells the last `id` that it has seen.
    """
    first = b"" if id is None else f"id: {id}\n".encode()
    return first + b"event: " + name.encode() + b"\ndata: " + orjson.dumps(values) + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events from an async generator, which is closed however the answer ends."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None):
        headers = {"cache-control": "no-store", **(headers or {})}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)
