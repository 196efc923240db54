"""Replay: how a server whose batch times are known would have served a load. Computed in no time, nothing is run.

First in, first out from measured times is exact for B0, whose pictures take as long busy or not; for B1 it finds the
settings of @serve.batch worth running, out of more than anyone would try by hand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from bench.arrivals import at_rate
from bench.capacity import highest
from bench.load import ATTAINMENT, Load
from bench.pipeline import group_key, groups_of
from bench.workloads import class_of
from models.request import GenerationRequest

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 48)
BATCH_WAITS_S = (0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
BatchSeconds = Callable[[Sequence[GenerationRequest]], float]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """The two settings of @serve.batch."""

    max_size: int
    wait_s: float

    def __str__(self) -> str:
        return f"max_batch_size {self.max_size}, wait {self.wait_s} s"


FIFO = Batching(max_size=1, wait_s=0.0)


@dataclass(frozen=True, kw_only=True)
class BatchCosts:
    """Measured seconds of a pipeline call, by (side, pictures): a fixed part, and a part per step."""

    fixed_s: Mapping[tuple[int, int], float]
    step_s: Mapping[tuple[int, int], float]

    def batch_s(self, requests: Sequence[GenerationRequest]) -> float:
        """How long a batch takes when each group of equal parameters is one call, one after another."""
        total = 0.0
        for group in groups_of(requests):
            kind = class_of(requests[group[0]])
            fixed_s = _between(self.fixed_s, kind.side, len(group))
            total += fixed_s + kind.steps * _between(self.step_s, kind.side, len(group))
        return total


def _between(costs: Mapping[tuple[int, int], float], side: int, pictures: int) -> float:
    """Linear between the measured numbers of pictures, and beyond the last two."""
    known = sorted(n for s, n in costs if s == side)
    upper = next((i for i, n in enumerate(known) if n >= pictures), len(known) - 1)
    left, right = known[max(upper - 1, 0)], known[max(upper, 1)]
    share = (pictures - left) / (right - left)
    return costs[side, left] * (1 - share) + costs[side, right] * share


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests with their unit-rate arrivals and their deadlines after arrival."""

    requests: Sequence[GenerationRequest]
    arrivals: Sequence[float]
    limits_s: Sequence[float]

    def load(self, rate: float, give_up: bool) -> Load:
        """The same to be sent for real, at `rate` arrivals a second."""
        arrivals_s = at_rate(self.arrivals, rate)
        return Load(requests=self.requests, arrivals_s=arrivals_s, limits_s=self.limits_s, give_up=give_up)

    def latencies_s(self, rate: float, batching: Batching, batch_s: BatchSeconds) -> list[float]:
        """Each request's latency at `rate` arrivals a second."""
        return self._latencies_s(at_rate(self.arrivals, rate), batching, batch_s)

    def when_free_s(self, rate: float, size: int, batch_s: BatchSeconds) -> list[float]:
        """Each request's latency where a server that is free takes the oldest, and up to `size` that are like it."""
        times, latencies, now = at_rate(self.arrivals, rate), [0.0] * len(self.requests), 0.0
        left = list(range(len(times)))
        while left:
            now = max(now, times[left[0]])
            key = group_key(self.requests[left[0]])
            group = [i for i in left if times[i] <= now and group_key(self.requests[i]) == key][:size]
            now += batch_s([self.requests[i] for i in group])
            for i in group:
                latencies[i] = now - times[i]
            left = [i for i in left if i not in group]
        return latencies

    def _latencies_s(self, times: Sequence[float], batching: Batching, batch_s: BatchSeconds) -> list[float]:
        latencies, free = [0.0] * len(times), 0.0
        for batch, closed in _batches(times, batching):
            free = max(free, closed) + batch_s([self.requests[i] for i in batch])
            for i in batch:
                latencies[i] = free - times[i]
        return latencies

    def capacity(self, latencies_s: Callable[[float], Sequence[float]], high: float) -> float:
        """The highest rate up to `high` at which the attainment is reached by latencies that depend on the rate."""

        def passes(rate: float) -> bool:
            pairs = zip(latencies_s(rate), self.limits_s, strict=True)
            return sum(latency <= limit for latency, limit in pairs) >= ATTAINMENT * len(self.requests)

        return highest(passes, low=high / 100, high=high)

    def saturated(self, batching: Batching, batch_s: BatchSeconds) -> float:
        """Pictures per second when everything arrives at once, as it does when it is measured."""
        times = Load.saturating(self.requests).arrivals_s
        latencies = self._latencies_s(times, batching, batch_s)
        return len(self.requests) / max(time + latency for time, latency in zip(times, latencies, strict=True))


def _batches(times: Sequence[float], batching: Batching) -> Iterator[tuple[list[int], float]]:
    """(positions, time of closing) as @serve.batch forms them: when full or `wait_s` after it took its first.

    Forming goes on while the server is busy, so a batch can close small and then wait for its turn.
    """
    i, closed = 0, 0.0
    while i < len(times):
        opened = max(times[i], closed)
        until = opened + batching.wait_s
        batch = [i]
        while len(batch) < batching.max_size and i + len(batch) < len(times) and times[i + len(batch)] <= until:
            batch.append(i + len(batch))
        closed = max(opened, times[batch[-1]]) if len(batch) == batching.max_size else until
        yield batch, closed
        i += len(batch)


def best_for_capacity(trace: Trace, batch_s: BatchSeconds, high: float) -> tuple[float, Batching]:
    """The highest capacity among all settings, and the setting it takes."""

    def capacity(batching: Batching) -> float:
        return trace.capacity(lambda rate: trace.latencies_s(rate, batching, batch_s), high)

    return max(((capacity(batching), batching) for batching in _settings()), key=lambda found: found[0])


def best_for_saturation(trace: Trace, batch_s: BatchSeconds) -> tuple[float, Batching]:
    """The highest saturated throughput among all settings, and the setting it takes."""
    return max(((trace.saturated(batching, batch_s), batching) for batching in _settings()), key=lambda found: found[0])


def _settings() -> Iterator[Batching]:
    for max_size, wait_s in product(BATCH_SIZES, BATCH_WAITS_S):
        yield Batching(max_size=max_size, wait_s=wait_s)
