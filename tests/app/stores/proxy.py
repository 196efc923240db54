"""A proxy on localhost that hurts: each request that passes meets the next fault."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from tests.app.loopback import listening

# 503: answered by the proxy; lost: done, but the answer never comes; mute: neither done nor answered.
Fault = Literal["503", "lost", "mute"]


@dataclass
class Proxy:
    """Where it listens, the faults to come, and the requests that reached the server behind it."""

    address: str
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None  # after those
    passed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@asynccontextmanager
async def proxy_before(upstream: str) -> AsyncIterator[Proxy]:
    """A proxy before `http://host:port`."""
    host, _, port = upstream.removeprefix("http://").partition(":")
    proxy = Proxy("")

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(_length(head))
        line = head.split(b"\r\n", 1)[0].decode()
        fault = proxy.faults.pop(0) if proxy.faults else proxy.always
        (proxy.refused if fault in ("503", "mute") else proxy.passed).append(line)
        if fault == "503":
            writer.write(b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        elif fault == "mute":
            await reader.read()  # until the client gives up
        else:
            answer = await _exchange(host, int(port), head, body)
            if fault != "lost":
                writer.write(answer)

    async with listening(talk) as own:
        proxy.address = f"http://127.0.0.1:{own}"
        yield proxy


async def _exchange(host: str, port: int, head: bytes, body: bytes) -> bytes:
    """The answer of the server, which is asked to close the connection after it."""
    reader, writer = await asyncio.open_connection(host, port)
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
    writer.write(b"\r\n".join([*lines, b"connection: close", b"", b""]) + body)
    try:
        return await reader.read()
    finally:
        writer.transport.abort()  # all of it is read


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0
