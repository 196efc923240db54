"""What will be asked for and what will be broken, and when: all of it decided by one seed before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.faults.log import FaultKind

KILLS: tuple[FaultKind, ...] = ("model", "runner", "gateway", "proxy", "controller")
OWNERS = 3
FIRST_FAULT_S = 3.0  # so that there is work to disturb
SHAPES, COLOURS = ("circle", "star", "heart", "ring"), ("red", "green", "blue", "yellow")
SIDE = 64


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """A job to submit `at_s` after the beginning, `again` once more with the same key, and to cancel after a while.

    `deaf` is the number of attempts at which the receiver refuses the job's webhook; -1 says that it is gone (410).
    """

    number: int
    at_s: float
    owner: int
    body: dict[str, Any]
    again: bool
    cancel_after_s: float | None
    webhook: bool
    deaf: int

    @property
    def key(self) -> str:
        """The idempotency key."""
        return f"job-{self.number}"

    @property
    def seed(self) -> int:
        return self.body["seed"]

    @property
    def samples(self) -> int:
        return self.body["samples"]


@dataclass(frozen=True, kw_only=True)
class PlannedFault:
    """A fault `at_s` after the beginning. `choice`, from 0 to 1, picks among the processes there are by then."""

    at_s: float
    kind: FaultKind
    lasts_s: float
    choice: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that one run does, in order of time."""

    jobs: Sequence[PlannedJob]
    faults: Sequence[PlannedFault]


def planned(
    seed: int, jobs: int, faults: int, kinds: Sequence[FaultKind], every_s: float, outage_s: float, rest_s: float
) -> Plan:
    """The plan of a seed: a fault about every `every_s` seconds, jobs at a steady rate from begin to end.

    Each kind comes as often as every other, give or take one. Outages last from a second to `outage_s`, the first of
    each kind all of it; between two are at least `rest_s` seconds, since what is always broken cannot work.
    """
    chance = Random(seed)
    deck = [kinds[i % len(kinds)] for i in range(faults)]
    chance.shuffle(deck)
    planned_faults, at_s, well_at_s = [], FIRST_FAULT_S, 0.0
    for kind in deck:
        first = all(fault.kind != kind for fault in planned_faults)
        lasts_s = 0.0 if kind in KILLS else outage_s if first else chance.uniform(1.0, max(1.0, outage_s))
        at_s = max(at_s, well_at_s) if lasts_s else at_s
        planned_faults.append(PlannedFault(at_s=at_s, kind=kind, lasts_s=lasts_s, choice=chance.random()))
        well_at_s = at_s + lasts_s + rest_s if lasts_s else well_at_s
        at_s += every_s * chance.uniform(0.5, 1.5)
    return Plan(jobs=[_job(seed, i, at_s * i / jobs, chance) for i in range(jobs)], faults=planned_faults)


def _job(seed: int, number: int, at_s: float, chance: Random) -> PlannedJob:
    """A small picture or two; the seed belongs to this job alone, so that a job made twice is seen."""
    samples = chance.choice((1, 1, 2))
    body = {
        "prompt": f"a {chance.choice(COLOURS)} {chance.choice(SHAPES)}",
        "width": SIDE,
        "height": SIDE,
        "steps": chance.randint(4, 20),
        "samples": samples,
        "seed": (seed * 100_000 + number) * 10,
        "priority": chance.choice(("interactive", "batch")),
    }
    if chance.random() < 0.1:
        body["deadline_s"] = chance.choice((3.0, 60.0, 600.0))
    return PlannedJob(
        number=number,
        at_s=at_s,
        owner=chance.randrange(OWNERS),
        body=body,
        again=chance.random() < 0.2,
        cancel_after_s=chance.uniform(0.0, 4.0) if chance.random() < 0.1 else None,
        webhook=chance.random() < 0.8,
        deaf=chance.choice((1, -1)) if chance.random() < 0.1 else 0,
    )
