"""A crowd of HTTP clients in one process, in a closed or an open loop. It leaves the cores to the server."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpcore2
import orjson

from bench.processes import Meter, Usage
from bench.quantile import quantile

STAGES = ("queued", "encode", "denoise", "decode")  # an answer's timings inside the engine
TIMEOUT_S = 300.0
PAUSE_S = 0.1  # after a failure, so that a server that refuses is not stormed


@dataclass(frozen=True, kw_only=True)
class Query:
    """One HTTP request; a body makes it a POST of JSON."""

    path: str
    body: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a crowd got and what that took: answers a second, and seconds of those that were answered with 200.

    `way_s` is what of each was not spent in the engine, where the answers tell that.
    """

    seconds: float
    failed: int
    latency_s: tuple[float, ...]
    way_s: tuple[float, ...]
    usage: Usage

    @property
    def per_s(self) -> float:
        return len(self.latency_s) / self.seconds

    def each_ms(self, kind: str) -> float:
        """Milliseconds of a core that this kind of process spent for each answer."""
        return 1000 * self.usage.by_kind.get(kind, 0.0) / max(len(self.latency_s), 1)


def quantile_ms(seconds: Sequence[float], share: float) -> float | None:
    """The smallest that this share of all do not exceed, in milliseconds; None of nothing."""
    return 1000 * quantile(seconds, share) if seconds else None


@dataclass
class _Heard:
    latency_s: list[float] = field(default_factory=list)
    way_s: list[float] = field(default_factory=list)
    failed: int = 0

    def reading(self, seconds: float, usage: Usage) -> Reading:
        return Reading(
            seconds=seconds,
            failed=self.failed,
            latency_s=tuple(self.latency_s),
            way_s=tuple(self.way_s),
            usage=usage,
        )


class Crowd:
    """Clients of one server, which is metered."""

    def __init__(self, address: str, meter: Meter):
        self._address, self._meter = address, meter
        self._pool = httpcore2.AsyncConnectionPool(max_connections=None, max_keepalive_connections=None)
        self._heard = _Heard()

    async def __aenter__(self) -> Self:
        await self._pool.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.__aexit__(kind, error, trace)

    async def closed(self, clients: int, warm_s: float, seconds: float, query: Callable[[int], Query]) -> Reading:
        """So many clients, each of whom asks again when it has its answer. What counts is answered after `warm_s` and
        after everybody's first answer: all of them ask at once in the beginning, which is no steady load."""
        loop = asyncio.get_running_loop()
        numbers, over = itertools.count(), asyncio.Event()
        heard = [asyncio.Event() for _ in range(clients)]

        async def client(answered: asyncio.Event) -> None:
            while not over.is_set():
                await self._ask(query(next(numbers)), loop.time())
                answered.set()

        async with asyncio.TaskGroup() as tasks:
            for answered in heard:
                tasks.create_task(client(answered))
            await asyncio.gather(asyncio.sleep(warm_s), *(answered.wait() for answered in heard))
            self._begin()
            began = loop.time()
            await asyncio.sleep(seconds)
            over.set()
            return self._heard.reading(loop.time() - began, self._meter.stop())

    async def opened(self, arrivals_s: Sequence[float], query: Callable[[int], Query]) -> Reading:
        """Clients who ask at these times, whatever became of the others; latency counts from then."""
        loop = asyncio.get_running_loop()
        self._begin()
        began = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for number, arrival_s in enumerate(arrivals_s):
                await asyncio.sleep(max(began + arrival_s - loop.time(), 0.0))
                tasks.create_task(self._ask(query(number), began + arrival_s))
        return self._heard.reading(loop.time() - began, self._meter.stop())

    def _begin(self) -> None:
        self._heard = _Heard()
        self._meter.start()

    async def _ask(self, query: Query, since: float) -> None:
        answer = await self._answer(query)
        if answer is None or answer.status != 200:
            self._heard.failed += 1
            await asyncio.sleep(PAUSE_S)
            return
        spent = asyncio.get_running_loop().time() - since
        self._heard.latency_s.append(spent)
        if query.body is not None:
            timings = orjson.loads(answer.content)["timings"]
            self._heard.way_s.append(spent - sum(timings[stage] for stage in STAGES))

    async def _answer(self, query: Query) -> httpcore2.Response | None:
        """None where the connection ends first, or nothing comes."""
        try:
            return await self._pool.request(
                "GET" if query.body is None else "POST",
                f"{self._address}{query.path}",
                headers={"content-type": "application/json"},
                content=None if query.body is None else orjson.dumps(query.body),
                extensions={"timeout": dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_S)},
            )
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException):
            return None
