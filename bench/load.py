"""The load generator: sends requests to a contender in closed or open loop and keeps what came back, when."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.contender import Contender, Work
from bench.quantile import quantile
from models.request import GenerationRequest

ATTAINMENT = 0.95  # the share of requests that must be in time
ONE_BY_ONE_S = 0.005  # between requests sent "at once": everyone gets them in one order, which decides about the tail
Done = Callable[[], None]
Say = Callable[[str, int, int], None]  # is told what is done now, how much of it is done, and of how much


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request's fate. Times are seconds since the run began; `limit_s` is its deadline after the arrival."""

    request: GenerationRequest
    arrival_s: float
    finished_s: float
    limit_s: float
    picture: bytes

    @property
    def latency_s(self) -> float:
        """From the *scheduled* arrival, so that a client kept waiting counts (no coordinated omission)."""
        return self.finished_s - self.arrival_s

    @property
    def in_time(self) -> bool:
        return self.latency_s <= self.limit_s


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run. `planned` is more than the outcomes where the run was given up because it could not pass."""

    outcomes: tuple[Outcome, ...]
    planned: int
    work: Work | None

    @property
    def pictures_per_s(self) -> float:
        """Pictures over the time from the first arrival to the last picture."""
        first = min(o.arrival_s for o in self.outcomes)
        return len(self.outcomes) / (max(o.finished_s for o in self.outcomes) - first)

    @property
    def attainment(self) -> float:
        """The share of all planned requests that were in time; those never sent count as late."""
        return sum(o.in_time for o in self.outcomes) / self.planned

    @property
    def passed(self) -> bool:
        return self.attainment >= ATTAINMENT

    def latency_s(self, percent: float) -> float:
        """The latency that `percent` % of the requests do not exceed (nearest rank)."""
        return quantile([o.latency_s for o in self.outcomes], percent / 100)

    @property
    def rows_per_forward(self) -> float | None:
        return self.work.rows_per_forward if self.work is not None and self.work.forwards else None


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent: requests, their scheduled arrivals (all 0: closed, saturating), and their deadlines."""

    requests: Sequence[GenerationRequest]
    arrivals_s: Sequence[float]
    limits_s: Sequence[float]
    give_up: bool = False  # stop sending once too many are late for the run to pass

    @classmethod
    def saturating(cls, requests: Sequence[GenerationRequest]) -> "Load":
        """Everything at once, but in order; no deadlines."""
        arrivals_s = [ONE_BY_ONE_S * i for i in range(len(requests))]
        return cls(requests=requests, arrivals_s=arrivals_s, limits_s=[math.inf] * len(requests))

    @property
    def late_allowed(self) -> int:
        return len(self.requests) - math.ceil(ATTAINMENT * len(self.requests))


async def drive(contender: Contender, load: Load, done: Done = lambda: None) -> Run:
    """Sends the load and waits for every request that was sent. An error of the contender ends the run."""
    before = await contender.work()
    outcomes: list[Outcome] = []
    clock = asyncio.get_running_loop().time
    start = clock()

    async def one(i: int) -> None:
        picture = await contender.generate(load.requests[i])
        outcomes.append(
            Outcome(
                request=load.requests[i],
                arrival_s=load.arrivals_s[i],
                finished_s=clock() - start,
                limit_s=load.limits_s[i],
                picture=picture,
            )
        )
        done()

    async with asyncio.TaskGroup() as tasks:
        for i, arrival_s in enumerate(load.arrivals_s):
            await asyncio.sleep(max(start + arrival_s - clock(), 0.0))
            if load.give_up and _late(load, outcomes, clock() - start) > load.late_allowed:
                break
            tasks.create_task(one(i))
    after = await contender.work()
    work = after.since(before) if before is not None and after is not None else None
    return Run(outcomes=tuple(outcomes), planned=len(load.requests), work=work)


async def driven(contender: Contender, load: Load, what: str, say: Say) -> Run:
    """`drive`, telling how far it is."""
    done, what = 0, f"{contender.name}: {what}"

    def count() -> None:
        nonlocal done
        done += 1
        say(what, done, len(load.requests))

    say(what, 0, len(load.requests))
    return await drive(contender, load, count)


def _late(load: Load, outcomes: Sequence[Outcome], now_s: float) -> int:
    """How many are known to be late: all that are overdue by now, less those that were in time before."""
    overdue = sum(a + limit < now_s for a, limit in zip(load.arrivals_s, load.limits_s, strict=True))
    return overdue - sum(o.in_time and o.arrival_s + o.limit_s < now_s for o in outcomes)
