"""B1c: static batches without Ray: whenever the pipeline is free, it draws those waiting who are like the oldest."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np

from bench.contender import ROWS, Work
from bench.pipeline import Pipeline, group_key
from models.images import encode
from models.request import GenerationRequest

Waiting = tuple[GenerationRequest, "asyncio.Future[np.ndarray]"]


def padded_size(pictures: int, sizes: Sequence[int]) -> int:
    """The smallest of the sizes that has room for so many."""
    return min(size for size in sizes if size >= pictures)


class Static:
    """Every call has one of the `sizes` in pictures, the last ones repeated where fewer wait: a compiled network wants
    few shapes. All of them are made in the worker's thread."""

    def __init__(
        self,
        make: Callable[[], Pipeline],
        sizes: Sequence[int],
        worker: ThreadPoolExecutor,
        name: str,
        title: str,
    ):
        self.name = name
        self.title = title
        self._make = make
        self._sizes = sizes
        self._worker = worker

    async def __aenter__(self) -> Self:
        self._pipeline = await asyncio.get_running_loop().run_in_executor(self._worker, self._make)
        self._padded = 0
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
        work = self._pipeline.work
        return replace(work, rows=work.rows - self._padded, padded=self._padded)

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(0)  # those who arrive in the same moment are seen together
            key = group_key(self._waiting[0][0])
            group = [waiting for waiting in self._waiting if group_key(waiting[0]) == key][: max(self._sizes)]
            self._waiting = [waiting for waiting in self._waiting if waiting not in group]
            if not self._waiting:
                self._arrived.clear()
            await self._draw(group)

    async def _draw(self, group: list[Waiting]) -> None:
        """A failure is the failure of each who waited for it."""
        requests = [request for request, _ in group]
        missing = padded_size(len(requests), self._sizes) - len(requests)
        self._padded += missing * ROWS * (requests[0].steps or 0)
        padded = requests + requests[-1:] * missing
        try:
            pictures = await asyncio.get_running_loop().run_in_executor(self._worker, self._pipeline.draw, padded)
        except Exception as fault:
            for _, drawn in group:
                drawn.set_exception(fault)
            return
        for (_, drawn), picture in zip(group, pictures, strict=False):
            drawn.set_result(picture)
