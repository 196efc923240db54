"""B0: diffusers' pipeline, one request at a time, first come first served."""

import asyncio
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from bench.contender import Work
from bench.pipeline import Pipeline, embedded
from bench.replay import BatchCosts
from bench.workloads import RequestClass, request_of
from models.images import encode
from models.request import GenerationRequest

STEPS_TIMED = (4, 12)  # two points give a call's fixed part and its part per step


class Serial:
    """The queue in front of the pipeline is the executor's. Pictures are packed beside it, as the engine does.

    A `worker` that is handed in stays when the contender closes.
    """

    def __init__(
        self,
        make: Callable[[], Pipeline],
        name: str = "B0",
        title: str = "diffusers, one at a time",
        worker: ThreadPoolExecutor | None = None,
    ):
        self.name = name
        self.title = title
        self._make = make
        self._given = worker

    @classmethod
    def embedded(cls, threads: int) -> Self:
        return cls(partial(embedded, threads))

    async def __aenter__(self) -> Self:
        # Made where it runs: torch is at its fastest when no other thread has computed (models.aside).
        self._worker = self._given or ThreadPoolExecutor(max_workers=1)
        self._pipeline = await asyncio.get_running_loop().run_in_executor(self._worker, self._make)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._given is None:
            self._worker.shutdown()
        self._pipeline.close()

    async def generate(self, request: GenerationRequest) -> bytes:
        [picture] = await self._draw([request])
        return await asyncio.to_thread(encode, picture, "png")

    async def work(self) -> Work:
        return self._pipeline.work

    async def isolated_s(self, kind: RequestClass, repeats: int) -> float:
        """The median time of a request of this class with the machine to itself."""
        return statistics.median([await self._timed_s(kind, 1) for _ in range(repeats)])

    async def batch_costs(self, sides: Iterable[int], pictures: Sequence[int]) -> BatchCosts:
        """What the pipeline's calls cost, by size and number of pictures."""
        fixed, step = {}, {}
        few, many = STEPS_TIMED
        for side in sides:
            for n in pictures:
                await self._timed_s(RequestClass(side, 1), n)  # the first of a shape is slow
                few_s, many_s = [await self._timed_s(RequestClass(side, steps), n) for steps in STEPS_TIMED]
                step[side, n] = max((many_s - few_s) / (many - few), 1e-6)
                fixed[side, n] = max(few_s - few * step[side, n], 0.0)
        return BatchCosts(fixed_s=fixed, step_s=step)

    async def _timed_s(self, kind: RequestClass, pictures: int) -> float:
        start = time.perf_counter()
        await self._draw([request_of(kind, seed) for seed in range(pictures)])
        return time.perf_counter() - start

    async def _draw(self, requests: list[GenerationRequest]) -> list[np.ndarray]:
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._pipeline.draw, requests)
