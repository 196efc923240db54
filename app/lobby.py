"""The lobby: calls that wait for room at a replica, and whose turn it is. No Ray."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.hint import Hint, Party

UnderWay = Callable[[Party], float]  # the work that somebody has at replicas


class Waiter:
    """A call in the lobby."""

    def __init__(self, hint: Hint, number: int):
        self.hint, self.number = hint, number
        self._called = asyncio.Event()

    def call(self) -> None:
        self._called.set()

    async def called(self, seconds: float) -> bool:
        """Waits until it is called, but for no longer."""
        try:
            async with asyncio.timeout(seconds):
                await self._called.wait()
        except TimeoutError:
            return False
        return True


class Lobby:
    """Of one router; belongs to its event loop."""

    def __init__(self) -> None:
        self._waiters: dict[int, Waiter] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._waiters)

    @contextmanager
    def place(self, hint: Hint) -> Iterator[Waiter]:
        """A call's place for as long as it waits."""
        waiter = Waiter(hint, next(self._numbers))
        self._waiters[waiter.number] = waiter
        try:
            yield waiter
        finally:
            self._waiters.pop(waiter.number, None)

    def next(self, under_way: UnderWay) -> Waiter | None:
        """Whose turn it is: interactive before batch, then who has the least work at replicas, then who came first."""
        if not self._waiters:
            return None
        waiters = self._waiters.values()
        has = {party: under_way(party) for party in {waiter.hint.party for waiter in waiters}}
        return min(waiters, key=lambda one: (one.hint.party.batch, has[one.hint.party], one.number))

    def call(self, waiter: Waiter) -> None:
        """Sends a call in; it waits no more."""
        self._waiters.pop(waiter.number, None)
        waiter.call()
