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
    open_loop: int  # requests of one trial
    repeats: int  # of a request alone
    group_sizes: tuple[int, ...]  # whose batch times are measured for tuning B1
    refinements: int

    @classmethod
    def make(cls, *, quick: bool, contenders: list[str], workloads: list[str], seed: int, threads: int) -> Self:
        """The full plan takes about twenty minutes on two idle cores, the quick one a few."""
        named = tuple(WORKLOADS[name] for name in workloads)
        return cls(
            workloads=named or ((MIXED_STEPS,) if quick else tuple(WORKLOADS.values())),
            contenders=tuple(contenders),
            seed=seed,
            threads=threads,
            saturating=12 if quick else 48,
            open_loop=10 if quick else 40,
            repeats=1 if quick else 3,
            group_sizes=(1, 4) if quick else (1, 2, 4, 8, 16),
            refinements=0 if quick else 1,
        )
