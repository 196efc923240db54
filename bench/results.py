"""Results: what a run found, as plain data, and the ratios that are read from it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.machine import Machine

BASELINES = ("B0", "B1")


@dataclass(frozen=True, kw_only=True)
class Saturated:
    """Everything submitted at once. `difference` is the largest from B0's pictures at any pixel, of 255."""

    pictures_per_s: float
    rows_per_forward: float | None
    difference: int | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """One open-loop trial: Poisson arrivals at `rate` a second, latencies from the scheduled arrival."""

    rate: float
    attainment: float
    p50_s: float
    p99_s: float
    rows_per_forward: float | None


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The highest rate with enough in time; `trials` are the runs that decided it, none where it was computed."""

    rate: float
    trials: tuple[OpenLoop, ...]
    note: str = ""


@dataclass(kw_only=True)
class Measured:
    """One contender under one workload; what was not asked for stays None."""

    contender: str
    title: str
    saturated: Saturated | None = None
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

    def throughput(self, *contenders: str) -> float | None:
        """The best of these contenders' saturated throughput, None where none was measured."""
        found = [self.of(name) for name in contenders]
        return max((m.saturated.pictures_per_s for m in found if m and m.saturated), default=None)

    def capacity(self, *contenders: str) -> float | None:
        """The best of these contenders' capacity, None where none was measured."""
        found = [self.of(name) for name in contenders]
        return max((m.capacity.rate for m in found if m and m.capacity), default=None)


@dataclass(kw_only=True)
class Results:
    """A whole run. `drift` is B0's throughput at the end over that at the beginning."""

    machine: Machine
    command: str
    seed: int
    workloads: list[WorkloadResults] = field(default_factory=list)
    drift: float | None = None
    minutes: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def ratio(above: float | None, below: float | None) -> float | None:
    """One over the other, None where either is missing or there is nothing to divide by."""
    return above / below if above is not None and below else None
