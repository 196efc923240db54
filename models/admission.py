"""Admission: which requests an engine takes on, by the seconds of work that wait there already. No torch."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from models.errors import DeadlineTooShort, Overloaded
from models.pace import Pace
from models.request import EffectiveRequest
from models.turns import PATIENCE_S
from models.work import breadth, work

# A deadline is refused only where the estimate is beyond twice of it. Estimates of what is there are good to a factor
# of 1.5, which a test holds; who leaves early or fails, and what company will share its forwards, nobody knows before.
TRUST = 0.5
_LEAST_RETRY_S = 1.0


class Part(Protocol):
    """A picture of a request on its way, and whether it has begun."""

    @property
    def work(self) -> float: ...
    @property
    def breadth(self) -> float: ...
    @property
    def begun(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a request takes up at an engine that has it, or is asked to take it on.

    Whose it is, whether it is batch work, when it is due by time.monotonic(), its work still to come, the breadth of
    its forwards, its pictures that have not begun. `deadline_s` counts from its submission, None where it has none.
    """

    key: str
    batch: bool
    due: float
    deadline_s: float | None
    work: float
    breadth: float
    waiting: int

    @classmethod
    def of(cls, request: EffectiveRequest, key: str, submitted: float) -> "Claim":
        """Of a request that nothing was done for yet."""
        return cls(
            key=key,
            batch=request.priority == "batch",
            due=submitted + min(request.deadline_s or PATIENCE_S, PATIENCE_S),
            deadline_s=request.deadline_s,
            work=work(request),
            breadth=breadth(request),
            waiting=request.samples,
        )

    def left(self, parts: Collection[Part]) -> "Claim":
        """Of the same request where these are left."""
        return replace(
            self,
            work=sum(part.work for part in parts),
            breadth=sum(part.breadth for part in parts),
            waiting=sum(not part.begun for part in parts),
        )


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How many pictures may wait at an engine, and how many seconds of work may be there."""

    max_waiting: int = 256
    max_wait_s: float = math.inf


def check(newcomer: Claim, held: Sequence[Claim], bounds: Bounds, pace: Pace) -> None:
    """Whether there is room for one more request, told when it is submitted.

    Raises Overloaded, with the seconds until there will be, and DeadlineTooShort for a deadline that could not be kept
    on an idle engine. Batch work is not in an interactive request's way. A key that has less than its part of a bound
    finds room also where others have filled it.
    """
    seconds_per_work = pace.seconds_per_work(newcomer.breadth + sum(claim.breadth for claim in held))
    alone_s = newcomer.work * pace.seconds_per_work(newcomer.breadth)
    ahead = [claim for claim in held if claim.batch <= newcomer.batch]
    _check_places(newcomer, held, bounds.max_waiting, seconds_per_work)
    _check_wait(newcomer, ahead, bounds.max_wait_s, seconds_per_work)
    if newcomer.deadline_s is not None:
        _check_deadline(newcomer, ahead, newcomer.deadline_s, alone_s, seconds_per_work)


def _check_places(newcomer: Claim, held: Sequence[Claim], most: int, seconds_per_work: float) -> None:
    if not held:
        return  # it would not find more room at any other time
    waiting = sum(claim.waiting for claim in held)
    excess = _excess(newcomer, held, most, lambda claim: claim.waiting, newcomer.waiting)
    if excess > 0:
        share = min(1.0, excess / max(waiting, 1))  # of what is here, after which as many have begun
        raise _come_back(share * seconds_per_work * _work(held), f"{waiting} pictures wait already")


def _check_wait(newcomer: Claim, ahead: Sequence[Claim], max_wait_s: float, seconds_per_work: float) -> None:
    excess = _excess(newcomer, ahead, max_wait_s, lambda claim: seconds_per_work * claim.work, 0.0)
    if excess > 0:
        seconds = seconds_per_work * _work(ahead)
        raise _come_back(excess, f"{seconds:.0f} s of work wait already, and no more than {max_wait_s:g} s may")


def _excess(
    newcomer: Claim, claims: Sequence[Claim], most: float, size: Callable[[Claim], float], more: float
) -> float:
    """By how much a bound would be passed, not above 0 where there is room: in all, or in the newcomer's part of it.

    While others are there, what is its own becomes less only as fast as its part of the device allows.
    """
    keys = {newcomer.key, *(claim.key for claim in claims)}
    everybody = sum(map(size, claims)) + more
    own = sum(size(claim) for claim in claims if claim.key == newcomer.key) + more
    return min(everybody - most, len(keys) * own - most)


def _check_deadline(
    newcomer: Claim, ahead: Sequence[Claim], deadline_s: float, alone_s: float, seconds_per_work: float
) -> None:
    """By when it would be finished: after interactive work where it is batch work; after its own key's that is due
    before; and while that and it are done, every other key gets no more than they do (models.turns)."""
    if deadline_s < TRUST * alone_s:
        message = f"must be at least {alone_s:.1f}, which the request takes alone, not {deadline_s:g}"
        raise DeadlineTooShort("deadline_s", message, alone_s)
    before = [claim for claim in ahead if claim.batch < newcomer.batch]
    peers = [claim for claim in ahead if claim.batch == newcomer.batch]
    own = [claim for claim in peers if claim.key == newcomer.key and claim.due <= newcomer.due]
    mine = newcomer.work + _work(own)
    others = {claim.key for claim in peers} - {newcomer.key}
    shared = sum(min(mine, _work(claim for claim in peers if claim.key == key)) for key in others)
    finished_s = seconds_per_work * (_work(before) + mine + shared)
    if deadline_s < TRUST * finished_s:
        message = f"with what waits already it would take {finished_s:.0f} s, and its deadline is {deadline_s:g} s"
        raise _come_back(TRUST * finished_s - deadline_s, message)


def _work(claims: Iterable[Claim]) -> float:
    return sum(claim.work for claim in claims)


def _come_back(seconds: float, message: str) -> Overloaded:
    return Overloaded(max(_LEAST_RETRY_S, seconds), message)
