"""B1: Ray Serve with @serve.batch, what a user of Ray would pick; bench/deployment.py is what it runs."""

import asyncio
import os
from types import TracebackType
from typing import Self

from bench.contender import Work
from bench.replay import Batching
from models.request import GenerationRequest

# A private cluster for this run, without token, and quiet.
RAY_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
LOGICAL_CPUS = 8  # more than a small machine has: the controller and the replica must fit, nothing else runs


class Grouped:
    """The deployment, called through its handle from this process: no HTTP, which would only slow it."""

    name = "B1"
    title = "Ray Serve, @serve.batch"

    def __init__(self, threads: int):
        self._threads = threads

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        await asyncio.to_thread(ray.shutdown)

    def _start(self) -> None:
        os.environ.update(RAY_ENVIRONMENT)  # ray reads it once, when it is imported: not before here
        import ray
        from ray import serve

        from bench.deployment import GroupedPipeline

        ray.init(
            address="local",
            num_cpus=LOGICAL_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        self._handle = serve.run(GroupedPipeline.bind(self._threads), name="bench-grouped", route_prefix=None)

    async def tune(self, batching: Batching) -> None:
        await self._handle.tune.remote(batching)

    async def generate(self, request: GenerationRequest) -> bytes:
        return await self._handle.generate.remote(request)

    async def work(self) -> Work:
        return await self._handle.work.remote()
