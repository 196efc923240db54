"""Clients that draw one picture after another through the gateway, and remember how each of them went.

They send nothing twice. Whoever asks for a seed again has to get the same picture, whatever happened in between.
"""

import asyncio
import io
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx2
import numpy as np
from PIL import Image

TIMEOUT_S = 300.0
SEEDS = 6
CLOSE = 1  # of 255: what a picture may differ by, according to its neighbours in a batch


@dataclass(frozen=True)
class Answer:
    """How a request went: whose and when, and what is wrong with it, if anything."""

    model: str
    began: float
    ended: float
    fault: str = ""


@dataclass(frozen=True)
class Span:
    """What came of the requests that ended while something was done."""

    answers: Sequence[Answer]
    seconds: float

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.fault]

    def longest_gap_s(self, model: str) -> float:
        """The longest time without a picture of a model."""
        ends = [answer.ended for answer in self.answers if answer.model == model and not answer.fault]
        return max((later - earlier for earlier, later in itertools.pairwise(sorted(ends))), default=float("inf"))


class Load:
    """So many clients for each model, for as long as the block lasts."""

    def __init__(self, address: str, models: Sequence[str], clients: int = 2, steps: int = 12):
        self._address, self._models, self._clients, self._steps = address, models, clients, steps
        self._answers: list[Answer] = []
        self._first: dict[tuple[str, int], np.ndarray] = {}

    async def __aenter__(self) -> Self:
        self._stopping = False
        self._tasks = [asyncio.create_task(self._client(m, i)) for m in self._models for i in range(self._clients)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        for task in self._tasks if error else ():
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=error is not None)

    @contextmanager
    def span(self) -> Iterator[list[Span]]:
        """A list that holds, when the block has ended, what came of the requests that ended in it."""
        found: list[Span] = []
        count, began = len(self._answers), time.monotonic()
        yield found
        found.append(Span(self._answers[count:], time.monotonic() - began))

    async def some_more(self, count: int = 4) -> None:
        """Returns when each model has given so many more answers."""
        wanted = {model: self._count(model) + count for model in self._models}
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                if all(self._count(model) >= wanted[model] for model in self._models):
                    return
                await asyncio.sleep(0.05)

    def _count(self, model: str) -> int:
        return sum(answer.model == model for answer in self._answers)

    async def _client(self, model: str, number: int) -> None:
        async with httpx2.AsyncClient(base_url=self._address) as client:
            for turn in itertools.count(number):
                if self._stopping:
                    return
                began = time.monotonic()
                fault = await self._draw(client, model, turn % SEEDS)
                self._answers.append(Answer(model, began, time.monotonic(), fault))
                await asyncio.sleep(0.5 if fault else 0.0)

    async def _draw(self, client: httpx2.AsyncClient, model: str, seed: int) -> str:
        """What is wrong with the answer, nothing where it is the picture."""
        body = {"prompt": "a red circle", "model": model, "seed": seed, "steps": self._steps, "cache": False}
        try:
            answer = await client.post("/v1/generate", json=body, headers={"Accept": "image/png"}, timeout=TIMEOUT_S)
        except httpx2.HTTPError as fault:
            return repr(fault)
        if answer.status_code != 200:
            return f"{answer.status_code}: {answer.text[:300]}"
        picture = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB")).astype(int)
        first = self._first.setdefault((model, seed), picture)
        return "" if np.abs(picture - first).max() <= CLOSE else f"seed {seed} gave another picture"
