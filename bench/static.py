"""B1c: static batches without Ray: whenever the pipeline is free, it draws those waiting who are like the oldest."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import numpy as np

from bench.contender import Work
from bench.pipeline import Pipeline, group_key
from models.images import encode
from models.request import GenerationRequest

Waiting = tuple[GenerationRequest, "asyncio.Future[np.ndarray]"]


class Static:
    """Every call has `size` pictures, the last ones repeated where fewer wait: a compiled network wants one shape."""

    def __init__(self, make: Callable[[], Pipeline], size: int, name: str, title: str):
        self.name = name
        self.title = title
        self._make = make
        self._size = size

    async def __aenter__(self) -> Self:
        self._pipeline = await asyncio.to_thread(self._make)
        self._waiting: list[Waiting] = []
        self._arrived = asyncio.Event()
        self._serving = asyncio.create_task(self._serve())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._serving.cancel()
        with suppress(asyncio.CancelledError):
            await self._serving
        self._pipeline.close()

    async def generate(self, request: GenerationRequest) -> bytes:
        drawn: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, drawn))
        self._arrived.set()
        return await asyncio.to_thread(encode, await drawn, "png")

    async def work(self) -> Work:
        return self._pipeline.work

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(0)  # those who arrive in the same moment are seen together
            key = group_key(self._waiting[0][0])
            group = [waiting for waiting in self._waiting if group_key(waiting[0]) == key][: self._size]
            self._waiting = [waiting for waiting in self._waiting if waiting not in group]
            if not self._waiting:
                self._arrived.clear()
            await self._draw(group)

    async def _draw(self, group: list[Waiting]) -> None:
        """A failure is the failure of each who waited for it."""
        requests = [request for request, _ in group]
        padded = requests + requests[-1:] * (self._size - len(requests))
        try:
            pictures = await asyncio.to_thread(self._pipeline.draw, padded)
        except Exception as fault:
            for _, drawn in group:
                drawn.set_exception(fault)
            return
        for (_, drawn), picture in zip(group, pictures, strict=False):
            drawn.set_result(picture)
