"""Where the pictures of a run are kept: a folder, or a bucket behind a proxy that can answer with errors."""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from bench.serving import free_port
from tests.app.stores.proxy import Fault, Proxy, proxy_before

BUCKET = "pictures"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
WAYS: tuple[Fault, ...] = ("503", "lost")  # refused, and done without an answer


@dataclass(frozen=True)
class Place:
    """A store: its settings, the environment that it needs, and the proxy before it, if any."""

    settings: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    proxy: Proxy | None = None

    async def outage(self, lasts_s: float, choice: float) -> str:
        """Every request meets the same fault for so many seconds; tells which."""
        assert self.proxy is not None, "a folder has no requests"
        self.proxy.always = WAYS[int(choice * len(WAYS))]
        try:
            await asyncio.sleep(lasts_s)
            return f"every request met {self.proxy.always}"
        finally:
            self.proxy.always = None


@asynccontextmanager
async def folder(root: Path) -> AsyncIterator[Place]:
    """A folder on the disk."""
    yield Place({"kind": "folder", "path": str(root / "pictures")})


@asynccontextmanager
async def s3(root: Path) -> AsyncIterator[Place]:
    """moto's S3 server, which keeps objects in memory, behind a proxy."""
    port = free_port()
    command = (sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    with (root / "moto.log").open("wb") as said:
        server = await asyncio.create_subprocess_exec(*command, stdout=said, stderr=said, start_new_session=True)
    try:
        await _with_bucket(f"http://127.0.0.1:{port}")
        async with proxy_before(f"http://127.0.0.1:{port}") as proxy:
            settings = {"kind": "s3", "bucket": BUCKET, "endpoint": proxy.address, "region": "us-east-1"}
            credentials = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}
            yield Place(settings, credentials, proxy)
    finally:
        server.terminate()
        await asyncio.wait_for(server.wait(), STOP_TIMEOUT_S)


async def _with_bucket(address: str) -> None:
    async with asyncio.timeout(START_TIMEOUT_S), httpx2.AsyncClient() as client:
        while True:
            try:
                (await client.put(f"{address}/{BUCKET}")).raise_for_status()
                return
            except httpx2.TransportError:  # nobody listens yet
                await asyncio.sleep(0.2)


PLACES = {"folder": folder, "s3": s3}
