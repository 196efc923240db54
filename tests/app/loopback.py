"""A real HTTP server on the loopback that counts who comes, and does to them what a test says."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from weakref import WeakSet


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


Answer = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Loopback:
    """The server: where it listens, how many connections were made to it, and what they asked for."""

    port: int = 0
    connections: int = 0
    requests: list[Request] = field(default_factory=list)

    def url(self, path: str = "/", scheme: str = "http", host: str = "127.0.0.1") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


def response(status: int = 200, body: bytes = b"", **headers: object) -> bytes:
    """A whole response; `location=...`, `retry_after=...` are headers."""
    lines = [f"HTTP/1.1 {status} Status", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def always(status: int = 200, body: bytes = b"", **headers: object) -> Answer:
    """The same response to everybody."""

    async def answer(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(response(status, body, **headers))

    return answer


async def never(_: Request, __: asyncio.StreamWriter) -> None:
    """Takes the request and says nothing."""
    await asyncio.sleep(600)


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Waits for it."""
    for _ in range(round(timeout_s / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError(f"not so within {timeout_s} s")


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(talk: Talk, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A port where somebody talks to whoever connects; whoever is still connected in the end is cut off."""
    talking, writers = set[asyncio.Task[None]](), WeakSet[asyncio.StreamWriter]()

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talking.add(task)
        writers.add(writer)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await talk(reader, writer)
                await writer.drain()
        except asyncio.CancelledError:
            pass  # the test is over; asyncio would report it as a fault
        finally:
            talking.discard(task)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    server = await asyncio.start_server(begin, host, 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.sleep(0)  # who has just been let in begins to talk
        for task in tuple(talking):
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)
        for writer in tuple(writers):
            writer.transport.abort()  # with what a slow reader has not taken yet
        await asyncio.sleep(0)  # an aborted transport lets its socket go in the next turn
        await server.wait_closed()


@asynccontextmanager
async def serving(
    answer: Answer, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Loopback]:
    """The server for as long as it is needed."""
    loopback = Loopback()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loopback.connections += 1
        request = await _read(reader)
        loopback.requests.append(request)
        await answer(request, writer)

    async with listening(talk, tls, host) as loopback.port:
        yield loopback


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    method, target, _ = first.split(" ")
    return Request(method, target, headers, await reader.readexactly(int(headers.get("content-length", 0))))
