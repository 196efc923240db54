"""Admission: how much work may wait here for a model that sleeps. No engine is there yet to say that it is too much."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from models.errors import Overloaded

LEAST_S = 1.0  # that somebody is told to wait before asking again


class Place:
    """A request's place among those that no engine has taken on yet."""

    def __init__(self, admission: "Admission", model: str, work: float):
        self._admission, self._model, self.work = admission, model, work

    def leave(self, seconds_per_work: float = 0.0) -> None:
        """An engine has taken the request on, and told its pace; or, without a pace, the request is over."""
        self._admission.left(self._model, self, seconds_per_work)


class Admission:
    """Of one gateway process; belongs to its event loop. Seconds are work times the pace that an engine of the model
    has told last; where none has told yet, only Serve's own bound on requests counts."""

    def __init__(self, max_cold_wait_s: float = math.inf):
        """`max_cold_wait_s` bounds the work that waits for one model while it wakes."""
        self._max_s = max_cold_wait_s
        self._paces: dict[str, float] = {}
        self._waiting: dict[str, set[Place]] = defaultdict(set)
        self._waking: dict[str, float] = {}  # since when somebody has waited for a sleeping model
        self._wake_s: dict[str, float] = {}  # how long that took last

    @contextmanager
    def place(self, model: str, work: float, asleep: bool) -> Iterator[Place]:
        """A place for a request, left at the end at the latest. Raises Overloaded where the model sleeps and too much
        waits for it already; whoever is the only one may wait, however long the work."""
        if asleep:
            self._check(model, work)
            self._waking.setdefault(model, time.monotonic())
        place = Place(self, model, work)
        self._waiting[model].add(place)
        try:
            yield place
        finally:
            place.leave()

    def retry_after_s(self, model: str, unknown_s: float) -> float:
        """When what waits here now will have been done; `unknown_s` where nobody has told a pace yet."""
        if model not in self._paces:
            return unknown_s
        return max(LEAST_S, self._wakes_in_s(model) + self._seconds(model))

    def left(self, model: str, place: Place, seconds_per_work: float) -> None:
        """For places. A second time says nothing."""
        self._waiting[model].discard(place)
        if seconds_per_work > 0:
            self._paces[model] = seconds_per_work
            if model in self._waking:
                self._wake_s[model] = time.monotonic() - self._waking.pop(model)
        elif not self._waiting[model]:  # those who waited have given up
            self._waking.pop(model, None)

    def _check(self, model: str, work: float) -> None:
        waiting_s = self._seconds(model)
        beyond_s = waiting_s + work * self._paces.get(model, 0.0) - self._max_s
        if self._waiting[model] and beyond_s > 0:
            raise Overloaded(
                max(LEAST_S, self._wakes_in_s(model) + beyond_s),
                f"model {model} is waking up, and {waiting_s:.0f} s of work wait for it already",
            )

    def _seconds(self, model: str) -> float:
        return sum(place.work for place in self._waiting[model]) * self._paces.get(model, 0.0)

    def _wakes_in_s(self, model: str) -> float:
        """How much longer it takes to wake, going by the last time."""
        if model not in self._waking:
            return 0.0
        return max(0.0, self._wake_s.get(model, 0.0) - (time.monotonic() - self._waking[model]))
