"""E: Heliograph's engine in this process, its own thread, requests straight into `submit`."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from bench.contender import ROWS, Work
from bench.pipeline import SOURCE
from bench.workloads import MODEL
from models import families
from models.card import ModelCard
from models.engine import Engine, host
from models.events import Event, Failed, Finished
from models.registered import Adapters
from models.request import GenerationRequest

MAX_WAITING, MAX_WAIT_S = 100_000, 1e6  # nobody is refused in a benchmark


class InProcess:
    """The engine is made, and warmed up, while it opens."""

    def __init__(self, make: Callable[[], Engine], name: str = "E", title: str = "Heliograph, in process"):
        self.name = name
        self.title = title
        self._make = make
        self._rows = 0

    @classmethod
    def embedded(cls, threads: int, cap: int | None = None) -> Self:
        return cls(partial(embedded, threads, cap=cap))

    async def __aenter__(self) -> Self:
        self._engine = await asyncio.to_thread(host, self._make)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._engine.close)

    async def generate(self, request: GenerationRequest) -> bytes:
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[bytes] = loop.create_future()

        def on_event(event: Event) -> None:  # called from the engine's threads
            loop.call_soon_threadsafe(_settle, finished, event)

        self._engine.submit(request, on_event, progress=False)
        picture = await finished
        assert request.steps is not None
        self._rows += ROWS * request.steps
        return picture

    def cap(self, side: int) -> int:
        """The most rows that a forward of pictures of this side is given."""
        return self._engine.batcher.cap((4, side // 8, side // 8))

    @property
    def compiled_kinds(self) -> int:
        """How many kinds of forwards a compiled network makes."""
        captured = self._engine.captured
        return 0 if captured is None else captured.compiled_kinds

    async def work(self) -> Work:
        """Right between runs: the engine counts its forwards, the rows follow from the pictures it finished."""
        captured = self._engine.captured
        return Work(
            forwards=self._engine.load().forwards,
            rows=self._rows,
            padded=captured.padded if captured is not None else 0,
        )


def embedded(threads: int, warm_up: bool = True, adapters: Path | None = None, cap: int | None = None) -> Engine:
    """The embedded sd15 in float32 on the CPU, with the adapters in a folder; the warm-up measures its cap in rows
    unless that is given."""
    torch.set_num_threads(threads)
    family = families.load(family="sd", source=str(SOURCE), device="cpu", dtype="float32")
    card = ModelCard.read(MODEL, "sd", str(SOURCE))
    engine = Engine(family, card, max_waiting=MAX_WAITING, adapters=Adapters(family, adapters))
    if warm_up:
        engine.warm_up(cap)
    return engine


def _settle(finished: "asyncio.Future[bytes]", event: Event) -> None:
    if isinstance(event, Finished):
        finished.set_result(event.data)
    elif isinstance(event, Failed):
        finished.set_exception(event.error)
