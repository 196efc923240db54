"""Admission: how much work may wait in a gateway for a model: for it to wake, or for room at its replicas.

What an engine has taken on is the engine's to bound (models/admission.py).
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from models.errors import Overloaded

LEAST_S = 1.0  # that somebody is told to wait before asking again
AWAKE_S = 5.0  # after an engine was heard of, a count of no replicas is an old one


class Place:
    """A request's place among those that no engine has taken on yet; `key` says whose it is."""

    def __init__(self, admission: "Admission", model: str, key: str, work: float):
        self._admission, self._model, self.key, self.work = admission, model, key, work

    def leave(self, seconds_per_work: float = 0.0) -> None:
        """An engine has taken the request on, and told its pace; or, without a pace, the request is over."""
        self._admission.left(self._model, self, seconds_per_work)


class Admission:
    """Of one gateway process; belongs to its event loop. Seconds are work times the pace that an engine of the model
    has told last, over how many replicas there are; where none has told yet, only Serve's own bound on requests counts.
    """

    def __init__(self, max_wait_s: float = math.inf):
        """`max_wait_s` bounds the work that waits for one model."""
        self._max_s = max_wait_s
        self._paces: dict[str, float] = {}
        self._replicas: dict[str, int] = {}
        self._waiting: dict[str, set[Place]] = defaultdict(set)
        self._heard: dict[str, float] = {}  # when an engine of the model took something on last
        self._waking: dict[str, float] = {}  # since when somebody has waited for a sleeping model
        self._wake_s: dict[str, float] = {}  # how long that took last

    @contextmanager
    def place(self, model: str, key: str, work: float, replicas: int) -> Iterator[Place]:
        """A place for a request, left at the end at the latest. `replicas` run now; where none does, the model wakes.

        Raises Overloaded where too much waits already, of this key too: among N keys each may have an Nth of what may
        wait, whatever the others have, and whoever has nothing here may bring any work.
        """
        self._replicas[model] = replicas
        self._check(model, key, work)
        now = time.monotonic()
        if not replicas and now - self._heard.get(model, -math.inf) > AWAKE_S:
            self._waking.setdefault(model, now)
        place = Place(self, model, key, work)
        self._waiting[model].add(place)
        try:
            yield place
        finally:
            place.leave()

    def retry_after_s(self, model: str, unknown_s: float) -> float:
        """When what waits here now will have been done; `unknown_s` where nobody has told a pace yet."""
        if model not in self._paces:
            return unknown_s
        return max(LEAST_S, self._wakes_in_s(model) + self._seconds(model, self._work(model)))

    def left(self, model: str, place: Place, seconds_per_work: float) -> None:
        """For places. A second time says nothing."""
        self._waiting[model].discard(place)
        if seconds_per_work > 0:
            self._paces[model], self._heard[model] = seconds_per_work, time.monotonic()
            if model in self._waking:
                self._wake_s[model] = time.monotonic() - self._waking.pop(model)
        elif not self._waiting[model]:  # those who waited have given up
            self._waking.pop(model, None)

    def _check(self, model: str, key: str, work: float) -> None:
        own = self._work(model, key)
        if not own:
            return
        keys = {key, *(place.key for place in self._waiting[model])}
        everybody_s = self._seconds(model, self._work(model))
        most = min(everybody_s, len(keys) * self._seconds(model, own)) + self._seconds(model, work)
        if most > self._max_s:
            what = f"{everybody_s:.0f} s of work wait for it already"
            doing = "has no room at the moment" if self._replicas[model] else "is waking up"
            wait_s = self._wakes_in_s(model) + most - self._max_s
            raise Overloaded(max(LEAST_S, wait_s), f"model {model} {doing}, and {what}")

    def _work(self, model: str, key: str | None = None) -> float:
        """That waits for a model; a key's, where one is named."""
        return sum(place.work for place in self._waiting[model] if key in (None, place.key))

    def _seconds(self, model: str, work: float) -> float:
        return work * self._paces.get(model, 0.0) / max(1, self._replicas.get(model, 1))

    def _wakes_in_s(self, model: str) -> float:
        """How much longer it takes to wake, going by the last time."""
        if model not in self._waking:
            return 0.0
        return max(0.0, self._wake_s.get(model, 0.0) - (time.monotonic() - self._waking[model]))
