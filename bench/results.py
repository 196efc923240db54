"""Results: what a run found, as plain data, and the ratios that are read from it."""

import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bench.load import Run
from bench.machine import Machine

BASELINES = ("B0", "B1")


@dataclass(frozen=True, kw_only=True)
class Saturated:
    """Everything submitted at once, once in each round. `difference` is the largest from B0's pictures, of 255."""

    rounds: tuple[float, ...]  # pictures a second
    rows_per_forward: float | None
    difference: int | None
    note: str = ""

    @property
    def pictures_per_s(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    def and_again(self, later: "Saturated") -> "Saturated":
        """With another round, whose settings are those that are told."""
        apart = [one.difference for one in (self, later) if one.difference is not None]
        return replace(later, rounds=(*self.rounds, *later.rounds), difference=max(apart, default=None))


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """One open-loop trial: Poisson arrivals at `rate` a second, latencies from the scheduled arrival."""

    rate: float
    attainment: float
    p50_s: float
    p99_s: float
    rows_per_forward: float | None

    @classmethod
    def of(cls, rate: float, run: Run) -> "OpenLoop":
        return cls(
            rate=rate,
            attainment=run.attainment,
            p50_s=run.latency_s(50),
            p99_s=run.latency_s(99),
            rows_per_forward=run.rows_per_forward,
        )


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The highest rate with enough in time; `trials` are the runs that decided it, none where it was computed.

    Where the search was `cut` for want of time, a higher rate may have passed as well.
    """

    rate: float
    trials: tuple[OpenLoop, ...]
    note: str = ""
    cut: bool = False


@dataclass
class Measured:
    """One contender under one workload; what was not asked for stays None."""

    contender: str
    title: str
    saturated: Saturated
    capacity: Capacity | None = None
    common: OpenLoop | None = None


@dataclass(kw_only=True)
class WorkloadResults:
    """All contenders under one workload, in the order measured. `isolated_s` is B0's, by request class."""

    name: str
    title: str
    isolated_s: dict[str, float]
    measured: list[Measured] = field(default_factory=list)

    def of(self, contender: str) -> Measured | None:
        return next((m for m in self.measured if m.contender == contender), None)

    def throughput(self, contender: str) -> float | None:
        """A contender's saturated throughput, None where it was not measured."""
        measured = self.of(contender)
        return measured.saturated.pictures_per_s if measured else None

    def speedups(self, above: str, *below: str) -> tuple[float, ...]:
        """A contender's saturated throughput over the best of others', in each round: a machine that is slower for
        some minutes is so for all of a round. Empty where either was not measured."""
        rounds = {m.contender: m.saturated.rounds for m in self.measured}
        best = [max(one) for one in zip(*(rounds[name] for name in below if name in rounds), strict=False)]
        return tuple(a / b for a, b in zip(rounds.get(above, ()), best, strict=False))

    def capacity(self, *contenders: str) -> float | None:
        """The best of these contenders' capacity, None where none was measured."""
        found = [self.of(name) for name in contenders]
        return max((m.capacity.rate for m in found if m and m.capacity), default=None)


@dataclass(kw_only=True)
class Results:
    """A whole run."""

    machine: Machine
    command: str
    seed: int
    workloads: list[WorkloadResults] = field(default_factory=list)
    minutes: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def ratio(above: float | None, below: float | None) -> float | None:
    """One over the other, None where either is missing or there is nothing to divide by."""
    return above / below if above is not None and below else None
