"""The one guarded HTTP client: pictures by address, and webhooks. Who asks for an address is nobody's friend.

app/guard.py decides what is dialled. Here: http and https alone, on few ports; no proxy; certificates compared with the
name; a new connection for each request; limits on bytes and on time; redirects only for pictures, each checked like the
first address. A caller learns that an address could not be used, never why, lest it explore our network by asking: the
reason is in the log.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from weakref import WeakValueDictionary

import httpcore2
import httpx2

from app.guard import Guard
from app.keys.caller import ANONYMOUS, Caller, current
from app.settings import FetchSettings
from models.decoding import is_picture
from models.errors import InvalidRequest, Overloaded

CONNECT_S, READ_S = 5.0, 10.0  # for a connection (TLS takes as long again), and between two bytes
TURN_S = 5.0  # how long a picture waits while others are fetched
CALLERS = 4  # who can fetch at a time, each with as many turns: nobody takes all of them with servers that are slow
LARGE_PICTURES = 2  # of the largest size, whose bytes all pictures of a request may have together
MAX_REDIRECTS = 3
MAX_PICTURES = 8  # by address, in one request
MAX_ANSWER_BYTES = 4096  # that are read of the answer to a post

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {"user-agent": "heliograph", "accept-encoding": "identity"}  # what is not packed cannot be a bomb

_log = logging.getLogger(__name__)


class Unreachable(Exception):
    """Nothing answered at that address, or nothing may be sent there."""


class _Unusable(Exception):
    """Something answered, but not what was asked for."""


_FAULTS = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError, _Unusable)


@dataclass(frozen=True)
class Response:
    """What a post was answered with. Its body is not kept: nobody shall read through us what a private server says."""

    status: int
    retry_after_s: float | None


class Fetcher:
    """The client. Unless they are given, `guard` is made from the settings and `tls` from the system's certificates."""

    def __init__(self, settings: FetchSettings, guard: Guard | None = None, tls: ssl.SSLContext | None = None):
        self._settings = settings
        self._guard = guard or Guard(settings.networks, settings.hosts)
        self._tls = tls or httpx2.create_ssl_context(trust_env=False)
        self._turns = asyncio.Semaphore(settings.max_at_once)
        self._share = max(1, settings.max_at_once // CALLERS)
        self._of_callers: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def pictures(self, addresses: Mapping[str, str]) -> dict[str, bytes]:
        """The pictures at the addresses of a request's fields, by field; each distinct address is asked once.

        Raises InvalidRequest naming the field, and Overloaded.
        """
        fields = {url: field for field, url in reversed([*addresses.items()])}
        if len(fields) > MAX_PICTURES:
            raise InvalidRequest(next(iter(addresses)), f"is one of more than {MAX_PICTURES} pictures by address")
        room = _Room(LARGE_PICTURES * self._settings.max_bytes)
        fetching = [asyncio.ensure_future(self.picture(url, field, room)) for url, field in fields.items()]
        try:
            found = dict(zip(fields, await asyncio.gather(*fetching), strict=True))
        finally:
            for task in fetching:
                task.cancel()
            await asyncio.gather(*fetching, return_exceptions=True)
        return {field: found[url] for field, url in addresses.items()}

    async def picture(self, url: str, field: str = "image", room: "_Room | None" = None) -> bytes:
        """The encoded picture at an address, which takes its bytes of the request's room.

        Raises InvalidRequest naming the field, and Overloaded.
        """
        address, most = self.address(url, field), self._settings.max_bytes
        async with self._turn():
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    return await self._picture(address, room or _Room(most))
            except _FAULTS as fault:
                _log_fault("GET", address, fault)
                raise InvalidRequest(
                    field,
                    f"could not be fetched; it must be a PNG, JPEG, WebP or AVIF of at most {most} bytes, "
                    f"{LARGE_PICTURES * most} with the request's others, at a public address, there within "
                    f"{self._settings.timeout_s} s",
                ) from fault

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float) -> Response:
        """Posts a body. An answer counts by its status; a redirect is one, and is not followed.

        Raises Unreachable, and InvalidRequest for what is no address that may be posted to.
        """
        address, response = self.address(url, "url"), None
        try:
            async with asyncio.timeout(timeout_s), self._answer("POST", address, headers, body) as answer:
                response = Response(answer.status, retry_after_s(_header(answer, b"retry-after")))
                await _body(answer, _Room(MAX_ANSWER_BYTES))  # so that a server that still sends sees no error
        except (*_FAULTS, Overloaded) as fault:
            if response is None:
                _log_fault("POST", address, fault)
                raise Unreachable("the address could not be reached") from fault
        return response

    def address(self, url: str | httpx2.URL, field: str) -> httpx2.URL:
        """The address, taken apart. Raises InvalidRequest naming the field; nothing is looked up."""
        ports = self._settings.ports
        try:
            parsed = httpx2.URL(url)
        except (httpx2.InvalidURL, ValueError) as malformed:
            raise InvalidRequest(field, "is not a valid address") from malformed
        if parsed.scheme not in _PORTS or not parsed.raw_host or parsed.userinfo or b"%" in parsed.raw_host:
            raise InvalidRequest(field, "must be an http or https address without a user name")
        if _port(parsed) not in ports:
            raise InvalidRequest(field, f"must be at one of the ports {', '.join(map(str, ports))}")
        return parsed

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        """One of the turns that there are at once, and of the caller's share of them. Raises Overloaded."""
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(TURN_S):
                    for turns in (*self._own(current.get()), self._turns):
                        await held.enter_async_context(turns)
            except TimeoutError as full:
                raise Overloaded(TURN_S, "too many pictures are being fetched") from full
            yield

    def _own(self, caller: Caller) -> tuple[asyncio.Semaphore, ...]:
        """The turns that a caller may have. Without keys all callers are one, and have all."""
        if caller == ANONYMOUS:
            return ()
        return (self._of_callers.setdefault(caller.id, asyncio.Semaphore(self._share)),)

    async def _picture(self, address: httpx2.URL, room: "_Room") -> bytes:
        for _ in range(1 + MAX_REDIRECTS):
            async with self._answer("GET", address, {"accept": "image/*"}) as answer:
                if answer.status not in _REDIRECTS:
                    return await self._picture_in(answer, room)
                address = self._next(address, _header(answer, b"location"))
        raise _Unusable(f"redirected more than {MAX_REDIRECTS} times")

    async def _picture_in(self, answer: httpcore2.Response, room: "_Room") -> bytes:
        if answer.status != 200:
            raise _Unusable(f"status {answer.status}")
        body = await _body(answer, _Room(self._settings.max_bytes), room)
        if not is_picture(body):
            raise _Unusable("not a picture")
        return body

    def _next(self, address: httpx2.URL, location: str | None) -> httpx2.URL:
        try:
            return self.address(address.join(location or ""), "location")
        except (InvalidRequest, httpx2.InvalidURL, ValueError) as wrong:
            raise _Unusable(f"redirected to what is no address: {wrong}") from wrong

    @asynccontextmanager
    async def _answer(
        self, method: str, address: httpx2.URL, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncGenerator[httpcore2.Response, None]:
        """The answer to one request, with its head read. Raises one of _FAULTS."""
        port = _port(address)
        origin = httpcore2.Origin(address.raw_scheme, address.raw_host, port)
        url = httpcore2.URL(scheme=address.raw_scheme, host=address.raw_host, port=port, target=address.raw_path)
        sent = {"host": address.netloc.decode(), **_HEADERS, **headers}
        limits = {"timeout": {"connect": CONNECT_S, "read": READ_S, "write": READ_S}}
        async with (
            httpcore2.AsyncHTTPConnection(origin, self._tls, network_backend=self._guard) as connection,
            connection.stream(method, url, headers=[*sent.items()], content=body, extensions=limits) as answer,
        ):
            yield answer


async def _body(answer: httpcore2.Response, *rooms: "_Room") -> bytes:
    """The answer's body, which takes its bytes of every room. Raises _Unusable once one is full."""
    body = bytearray()
    async with aclosing(answer.aiter_stream()) as chunks:
        async for chunk in chunks:
            for room in rooms:
                room.take(len(chunk))
            body += chunk
    return bytes(body)


class _Room:
    """How many bytes may still come."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._left = max_bytes, max_bytes

    def take(self, size: int) -> None:
        """Raises _Unusable where there are not so many."""
        self._left -= size
        if self._left < 0:
            raise _Unusable(f"more than {self._max_bytes} bytes")


def retry_after_s(value: str | None) -> float | None:
    """Seconds until a server wants to be asked again, None where it does not say (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _header(answer: httpcore2.Response, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in answer.headers if key.lower() == name), None)


def _port(address: httpx2.URL) -> int:
    return _PORTS[address.scheme] if address.port is None else address.port


def _log_fault(method: str, address: httpx2.URL, fault: Exception) -> None:
    """Without path and query, which often hold a secret."""
    where = f"{address.scheme}://{address.netloc.decode()}"
    _log.warning("%s %s: %s: %s", method, where, type(fault).__name__, fault)
