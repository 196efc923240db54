"""The plan: how much is measured, and under what."""

from dataclasses import dataclass
from typing import Self

from bench.workloads import MIXED_STEPS, WORKLOADS, Workload


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    workloads: tuple[Workload, ...]
    contenders: tuple[str, ...]
    seed: int
    threads: int
    saturating: int  # pictures
    rounds: int  # in each of which everyone is saturated
    open_loop: int  # requests of one trial
    compared: Workload  # under which everyone's latencies are compared at one rate; every such run takes a minute
    repeats: int  # of a request alone
    group_sizes: tuple[int, ...]  # whose batch times are measured for tuning B1
    refinements: int

    @classmethod
    def make(cls, *, quick: bool, contenders: list[str], workloads: list[str], seed: int, threads: int) -> Self:
        """The full plan takes about 50 minutes on two idle cores, the quick one a few."""
        named = tuple(WORKLOADS[name] for name in workloads)
        return cls(
            workloads=named or ((MIXED_STEPS,) if quick else tuple(WORKLOADS.values())),
            contenders=tuple(contenders),
            seed=seed,
            threads=threads,
            saturating=12 if quick else 40,
            rounds=1 if quick else 3,
            open_loop=10 if quick else 40,
            compared=MIXED_STEPS,
            repeats=1 if quick else 3,
            group_sizes=(1, 4) if quick else (1, 2, 4, 16),
            refinements=0 if quick else 1,
        )
