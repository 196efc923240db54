"""How much of their limits callers have used: requests and pixel-steps in a minute, jobs at a time.

A minute begins with the caller's first request in it. What does not fit is refused and not charged; what was charged
for nothing is given back. The counts are in this process's memory, so a caller of N gateways has N times as much.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from app.errors import BudgetSpent
from app.keys.caller import Caller
from models.errors import InvalidRequest
from models.request import EffectiveRequest

SLOT_RETRY_AFTER_S = 1.0
MINUTE_S = 60.0

PerMinute = Literal["requests_per_minute", "pixel_steps_per_minute"]


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What is left of a limit, and in how many seconds there is all of it again; `ends_at` names the minute."""

    limit: int
    remaining: int
    reset_s: float
    ends_at: float


class Budgets:
    """What each caller has used, by the caller's id. Belongs to one event loop."""

    def __init__(self) -> None:
        self._counts = MemoryStorage()
        self._windows = FixedWindowRateLimiter(self._counts)
        self._running: Counter[str] = Counter()
        self._lock = asyncio.Lock()

    async def charge(self, caller: Caller, field: PerMinute, cost: int = 1) -> Allowance | None:
        """Takes the cost from a caller's minute and tells what is left, None where there is no limit.

        Raises BudgetSpent where too little is left, InvalidRequest where a whole minute would not be enough.
        """
        limit: int | None = getattr(caller.limits, field)
        if limit is None:
            return None
        if cost > limit:
            raise InvalidRequest(field, f"of this key is {limit}; this request alone needs {cost}")
        item, names = RateLimitItemPerMinute(limit), (field, caller.id)
        async with self._lock:  # between looking and taking, nobody else takes
            stats = await self._windows.get_window_stats(item, *names)
            if stats.reset_time - time.time() > MINUTE_S:  # the clock, by which minutes end, was set back
                await self._windows.clear(item, *names)
            enough = await self._windows.test(item, *names, cost=cost)
            if enough:
                await self._windows.hit(item, *names, cost=cost)
            stats = await self._windows.get_window_stats(item, *names)
        reset_s = max(0.0, stats.reset_time - time.time())
        if not enough:
            message = f"{field} of this key is {limit}, of which {stats.remaining} are left; this request needs {cost}"
            raise BudgetSpent(reset_s, message, field, limit, stats.remaining)
        return Allowance(limit=limit, remaining=stats.remaining, reset_s=reset_s, ends_at=stats.reset_time)

    async def give_back(self, caller: Caller, field: PerMinute, cost: int, charged: Allowance | None) -> None:
        """Undoes a charge, by what it told; nothing where its minute is over."""
        if charged is None:
            return
        item, names = RateLimitItemPerMinute(charged.limit), (field, caller.id)
        async with self._lock:
            stats = await self._windows.get_window_stats(item, *names)
            if stats.reset_time == charged.ends_at:
                await self._counts.decr(item.key_for(*names), cost)

    @contextmanager
    def slot(self, caller: Caller) -> Iterator[None]:
        """One of the jobs that a caller may have at a time. Raises BudgetSpent where all run already."""
        limit = caller.limits.concurrent_jobs
        if limit is not None and self._running[caller.id] >= limit:
            message = f"{limit} jobs of this key run already, as many as it may have at a time"
            raise BudgetSpent(SLOT_RETRY_AFTER_S, message, "concurrent_jobs", limit)
        self._running[caller.id] += 1
        try:
            yield
        finally:
            self._running[caller.id] -= 1
            if not self._running[caller.id]:
                del self._running[caller.id]


def pixel_steps(request: EffectiveRequest) -> int:
    """What a request costs: its pixels times its steps, in both phases of a hires-fix, for all of its pictures.

    Steps that a denoise strength leaves out are counted: the budget is known before the work.
    """
    cost = request.width * request.height * request.steps
    if request.hires is not None:
        width, height = request.largest
        cost += width * height * (request.hires.steps or request.steps)
    return cost * request.samples
