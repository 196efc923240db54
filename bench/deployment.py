"""The Ray Serve deployment that B1 measures, as somebody who knows Serve would write it.

The pipeline is made and runs in one thread, so that requests are taken in meanwhile; the network may use as many
threads as the others get (Ray gives a replica one); waiting requests are not bounded; @serve.batch is tuned before it
is measured.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ray import serve

from bench.contender import Work
from bench.pipeline import embedded, groups_of
from bench.replay import Batching
from models.images import encode
from models.request import GenerationRequest


@serve.deployment(max_ongoing_requests=10_000)
class GroupedPipeline:
    """Takes requests one by one and draws them in batches, each group of equal parameters by one call."""

    def __init__(self, threads: int):
        # One thread for both: torch is at its fastest when no other thread has computed (models.aside).
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._pipeline = self._worker.submit(embedded, threads).result()

    async def tune(self, batching: Batching) -> None:
        self.draw_batch.set_max_batch_size(batching.max_size)
        self.draw_batch.set_batch_wait_timeout_s(batching.wait_s)

    async def work(self) -> Work:
        return self._pipeline.work

    async def generate(self, request: GenerationRequest) -> bytes:
        return await asyncio.to_thread(encode, await self.draw_batch(request), "png")

    @serve.batch(max_batch_size=1)
    async def draw_batch(self, requests: list[GenerationRequest]) -> list[np.ndarray]:
        """The batch answers when all of it is done: that is how @serve.batch works."""
        pictures: dict[int, np.ndarray] = {}
        for group in groups_of(requests):
            wanted = [requests[i] for i in group]
            drawn = await asyncio.get_running_loop().run_in_executor(self._worker, self._pipeline.draw, wanted)
            pictures |= zip(group, drawn, strict=True)
        return [pictures[i] for i in range(len(requests))]
