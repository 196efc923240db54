"""What was measured of a server that grows: the cases, their tables, and where each profile bends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.crowd import Reading, quantile_ms
from bench.report import NOTHING, Sheet

STRAIGHT = 0.9  # efficiency above which it has not bent
FULL = 0.9  # the share of the machine's cores, or of one core, above which no more is to be had
PROXIES = ("proxy", "HAProxy")
CLOSED, OPEN = "closed loop", "open loop"  # loads of Case that count replicas; any other names what gateways are asked


@dataclass(frozen=True, kw_only=True)
class Case:
    """One reading, and under what: `load` says what was asked for; `mib` is the largest replica of a model."""

    profile: str
    gateways: int
    replicas: int
    load: str
    reading: Reading
    mib: float

    def as_json(self) -> dict[str, Any]:
        reading, usage = self.reading, self.reading.usage
        return {
            "profile": self.profile,
            "gateways": self.gateways,
            "replicas": self.replicas,
            "load": self.load,
            "per_s": reading.per_s,
            "failed": reading.failed,
            "latency_ms": _quantiles(reading.latency_s),
            "way_ms": _quantiles(reading.way_s),
            "cores": usage.cores,
            "busiest": {"process": usage.busiest, "load": usage.load},
            "processor_ms_each": {kind: reading.each_ms(kind) for kind in usage.by_kind},
            "replica_mib": self.mib,
        }


def efficiency(case: Case, cases: Sequence[Case]) -> float:
    """Answers a second over replicas times those of one, which the profile's smallest closed loop tells."""
    first = min(of(cases, case.profile, CLOSED), key=lambda one: one.replicas)
    return case.reading.per_s / case.replicas / (first.reading.per_s / first.replicas)


def of(cases: Sequence[Case], profile: str, load: str) -> list[Case]:
    """The cases of a profile under a load."""
    return [case for case in cases if (case.profile, case.load) == (profile, load)]


def sheets(cases: Sequence[Case]) -> list[Sheet]:
    """One table of gateways over all profiles, and one of replicas for each."""
    profiles = dict.fromkeys(case.profile for case in cases)
    return [_gateway_sheet(cases), *(_replica_sheet(cases, profile) for profile in profiles)]


def _gateway_sheet(cases: Sequence[Case]) -> Sheet:
    rows = []
    for case in (case for case in cases if case.load not in (CLOSED, OPEN)):
        reading = case.reading
        parts = [reading.each_ms("gateway"), _proxy_ms(reading), reading.each_ms("model"), reading.each_ms("client")]
        rows.append(
            [
                f"{case.profile}, {case.gateways} gateway{'s' * (case.gateways > 1)}: {case.load}",
                f"{reading.per_s:.1f}",
                _ms(quantile_ms(reading.latency_s, 0.5)),
                _ms(quantile_ms(reading.latency_s, 0.95)),
                *(f"{part:.2f}" for part in parts),
                *_use(reading),
                str(reading.failed),
            ]
        )
    columns = ("gateways", "a second", "p50 ms", "p95 ms", "gateway", "proxy", "model", "client")
    title = "What gateways take from a model that takes no time; of each process, ms of a core for an answer"
    return Sheet(title=title, columns=(*columns, "cores", "busiest", "failed"), rows=rows)


def _replica_sheet(cases: Sequence[Case], profile: str) -> Sheet:
    rows = []
    for closed, opened in zip(of(cases, profile, CLOSED), of(cases, profile, OPEN), strict=False):
        way_s = opened.reading.way_s
        rows.append(
            [
                str(closed.replicas),
                f"{closed.reading.per_s:.2f}",
                f"{efficiency(closed, cases):.0%}",
                *_use(closed.reading),
                f"{opened.reading.per_s:.2f}",
                _ms(quantile_ms(way_s, 0.5)),
                _ms(quantile_ms(way_s, 0.95)),
                str(closed.reading.failed + opened.reading.failed),
            ]
        )
    columns = ("replicas", "pictures/s", "efficiency", "cores", "busiest", "at 70 %", "way p50 ms", "p95 ms", "failed")
    return Sheet(title=f"Replicas that take 2 s for 4 pictures, profile {profile}", columns=columns, rows=rows)


def facts(cases: Sequence[Case], cores: int) -> Iterator[str]:
    """In words, what the tables mean."""
    for profile in dict.fromkeys(case.profile for case in cases):
        yield from _bend(of(cases, profile, CLOSED), cases, cores)
        yield from _costs(profile, cases)
    largest = max(cases, key=lambda case: case.replicas)
    yield f"A replica of a model holds at most {largest.mib:.0f} MiB (PSS) where {largest.replicas} share a machine."


def _bend(closed: Sequence[Case], cases: Sequence[Case], cores: int) -> Iterator[str]:
    bent = next((case for case in closed if efficiency(case, cases) < STRAIGHT), None)
    if bent is None:
        for last in closed[-1:]:
            yield f"{last.profile}: no bend up to {last.replicas} replicas."
        return
    usage = bent.reading.usage
    if usage.cores >= FULL * cores:
        why = f"the machine is full ({usage.cores:.1f} of {cores} cores)"
    elif usage.load >= FULL:
        why = f"one process is full ({usage.busiest}, {usage.load:.0%} of a core)"
    else:
        why = f"neither the machine ({usage.cores:.1f} of {cores} cores) nor a process is full"
    share = f"{efficiency(bent, cases):.0%} of {bent.replicas} times one"
    yield f"{bent.profile}: bends at {bent.replicas} replicas ({share}): {why}; busiest is {usage.busiest}."


def _costs(profile: str, cases: Sequence[Case]) -> Iterator[str]:
    """By the processor's time, how much one process of each kind could do with a core of its own."""
    for case in (case for case in cases if case.profile == profile and case.load not in (CLOSED, OPEN)):
        if case.gateways == 1 and case.reading.latency_s:
            parts = {"gateway": case.reading.each_ms("gateway"), "proxy": _proxy_ms(case.reading)}
            most = ", ".join(f"a {kind} {1000 / ms:.0f}" for kind, ms in parts.items() if ms)
            yield f"{profile}, {case.load}: with a core of its own {most} a second."


def _proxy_ms(reading: Reading) -> float:
    return sum(reading.each_ms(kind) for kind in PROXIES)


def _use(reading: Reading) -> tuple[str, str]:
    usage = reading.usage
    return f"{usage.cores:.1f}", f"{usage.busiest} {usage.load:.0%}"


def _ms(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0f}"


def _quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    return {f"p{share:.0%}".rstrip("%"): quantile_ms(seconds, share) for share in (0.5, 0.95, 0.99)}
