"""A trace: requests of few and of many steps whose load rises, holds and stops; sent to the second, by an open loop."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from bench.workloads import MODEL

SHORT, LONG = 4, 50  # steps; half of the requests each
TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request of a trace, and its second."""

    at_s: float
    steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the load goes: a few requests, a rise, a hold at `peak` requests a second, and then nothing."""

    few_s: float = 20.0
    rise_s: float = 40.0
    hold_s: float = 180.0
    few: float = 0.2
    peak: float = 5.0

    def rate(self, at_s: float) -> float:
        """Requests a second."""
        if at_s < self.few_s:
            return self.few
        return self.few + (self.peak - self.few) * min(1.0, (at_s - self.few_s) / self.rise_s)

    @property
    def seconds(self) -> float:
        return self.few_s + self.rise_s + self.hold_s


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of an arrival. `wait_s` is what of its latency was not work on it: at the gateway, for a replica to
    wake, and in the engine. `error` is empty where there was a picture."""

    arrival: Arrival
    latency_s: float
    wait_s: float
    error: str = ""


def trace(shape: Shape, seed: int) -> list[Arrival]:
    """Arrivals of a Poisson process of that rate (by thinning); the first is at 0."""
    rng, now, arrivals = random.Random(seed), 0.0, [Arrival(at_s=0.0, steps=LONG, seed=0)]
    while (now := now + rng.expovariate(shape.peak)) < shape.seconds:
        if rng.random() * shape.peak < shape.rate(now):
            arrivals.append(Arrival(at_s=now, steps=rng.choice((SHORT, LONG)), seed=len(arrivals)))
    return arrivals


async def replay(address: str, arrivals: Sequence[Arrival], done: Callable[[], None]) -> list[Answer]:
    """Sends the arrivals when they are due, whatever became of earlier ones, and waits for all answers."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    start = time.monotonic()
    async with httpx2.AsyncClient(base_url=address, timeout=TIMEOUT_S, limits=limits) as client:

        async def one(arrival: Arrival) -> Answer:
            await asyncio.sleep(max(0.0, start + arrival.at_s - time.monotonic()))
            answer = await _ask(client, arrival, start)
            done()
            return answer

        return list(await asyncio.gather(*map(one, arrivals)))


async def _ask(client: httpx2.AsyncClient, arrival: Arrival, start: float) -> Answer:
    body = {"model": MODEL, "prompt": "a red circle", "steps": arrival.steps, "seed": arrival.seed, "cache": False}
    try:
        response = await client.post("/v1/generate", json=body)
        error = "" if response.status_code == 200 else f"{response.status_code} {response.text}"
    except httpx2.HTTPError as fault:
        response, error = None, repr(fault)
    latency_s = time.monotonic() - start - arrival.at_s  # from when it was due, so that a slow client hides nothing
    if response is None or error:
        return Answer(arrival=arrival, latency_s=latency_s, wait_s=latency_s, error=error)
    return Answer(arrival=arrival, latency_s=latency_s, wait_s=max(0.0, latency_s - _work_s(response.json())))


def _work_s(answer: dict[str, Any]) -> float:
    timings = answer["timings"]
    return timings["encode"] + timings["denoise"] + timings["decode"]
