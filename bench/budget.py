"""A budget of minutes, portioned out among what is to come, so that all of it gets some. No torch."""

import math
import time
from collections.abc import Callable


class Portion:
    """The time until a moment of the clock, seconds."""

    def __init__(self, until: float, clock: Callable[[], float]):
        self._until = until
        self._clock = clock

    def has(self, seconds: float) -> bool:
        return self._clock() + seconds <= self._until


class Budget:
    """What one portion leaves over goes to those after it. Without minutes there is no bound."""

    def __init__(self, minutes: float | None, portions: int, clock: Callable[[], float] = time.monotonic):
        self._until = math.inf if minutes is None else clock() + 60 * minutes
        self._portions = portions
        self._clock = clock

    def take(self, portions: int) -> Portion:
        """The time for the next so many portions of those that are left."""
        now = self._clock()
        until = now + (self._until - now) * portions / self._portions
        self._portions -= portions
        return Portion(until, self._clock)
