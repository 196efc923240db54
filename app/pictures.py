"""`GET /v1/images/{key}`: a stored picture, to whoever has a signed address of it.

The ranges, validators and preconditions are those of RFC 9110. One range is answered at a time: several in one request
have been used to exhaust servers (CVE-2025-62727), and no picture viewer needs them.
"""

import re
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from app.auth import PUBLIC, scope
from app.errors import Forbidden, RangeNotSatisfiable, envelope, status_of
from app.stores.links import PATH, Links
from app.stores.store import KEY, Span, Store, StoredObject

CHUNK = 4 * 1024 * 1024  # what a client that reads slowly keeps in our memory

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def pictures(store: Store, secret: bytes) -> APIRouter:
    """The path. `secret` is that of the Links that made the addresses."""
    router = APIRouter(tags=["pictures"])
    links, path = Links(secret), PATH + "/{key:path}"

    public = scope(PUBLIC)  # the address carries its own permission

    @router.head(path, include_in_schema=False, openapi_extra=public)
    @router.get(path, summary="A stored picture, by its signed address", response_class=Response, openapi_extra=public)
    async def picture(request: Request, key: str, expires: str = "", signature: str = "") -> Response:
        if not (KEY.fullmatch(key) and links.allows(key, expires, signature)):
            raise Forbidden("this address is not one that was given out here, or its time is over; ask for a new one")
        return await _answer(store, await store.head(key), request, int(expires))

    return router


async def _answer(store: Store, found: StoredObject, request: Request, expires: int) -> Response:
    headers = _headers(found, expires)
    if _has_it_already(request.headers.get("if-none-match", ""), headers["etag"]):
        return Response(status_code=304, headers=headers)
    try:
        span = _span(request, headers["etag"], found.bytes)
    except RangeNotSatisfiable as error:
        return JSONResponse(envelope(error), status_of(error), headers | {"content-range": f"bytes */{found.bytes}"})
    first, last = span or (0, found.bytes)
    headers |= {"content-length": str(last - first)}
    if span:
        headers |= {"content-range": f"bytes {first}-{last - 1}/{found.bytes}"}
    status = 206 if span else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=found.content_type)
    return StreamingResponse(_chunks(store, found.key, first, last), status, headers, found.content_type)


def _headers(found: StoredObject, expires: int) -> dict[str, str]:
    return {
        "etag": f'"{found.sha256}"',
        "accept-ranges": "bytes",
        "cache-control": f"private, immutable, max-age={max(0, expires - int(time.time()))}",
        "content-disposition": f'inline; filename="{found.filename}"',
        "x-content-type-options": "nosniff",
    }


def _has_it_already(if_none_match: str, etag: str) -> bool:
    """RFC 9110, 13.1.2: a list of tags, compared weakly, or a star."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def _span(request: Request, etag: str, size: int) -> Span | None:
    """The part that is asked for, None for all of it. Raises RangeNotSatisfiable for one beyond the end.

    RFC 9110, 14.2: a Range that is malformed, of another unit, or under an If-Range that does not hold is passed over.
    """
    asked = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", "").lower())
    if request.method != "GET" or not asked or asked[0] == "bytes=-":
        return None
    if request.headers.get("if-range", etag) != etag:
        return None
    first, last = asked.groups()
    if not first:
        span = max(0, size - int(last)), size
    else:
        span = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
    if span[0] >= span[1]:
        raise RangeNotSatisfiable("Range", f"must begin within the {size} bytes of the picture")
    return span


async def _chunks(store: Store, key: str, first: int, last: int) -> AsyncIterator[bytes]:
    for start in range(first, last, CHUNK):
        yield await store.get(key, (start, min(start + CHUNK, last)))
