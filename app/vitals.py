"""What a replica tells Serve of itself: to the autoscaler how much there is to do, to routers what it is warm for."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from app.hint import Hint
from models.load import Load

FRESH = 0.1  # of the mean work of a request, what the latest one counts
KEPT = 64  # names and sizes that were met lately, of each


class Vitals:
    """Of one replica. Requests are noted from any thread, stats are asked for by Serve. `pace` is the engine's in full
    forwards, in seconds per unit of work: at that pace it would do what waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mean_work = 0.0
        self._requests = 0
        self._loras: dict[str, None] = {}  # in the order in which they were met last
        self._sizes: dict[str, None] = {}

    def note(self, hint: Hint) -> None:
        """Remembers a request that was taken on."""
        with self._lock:
            self._mean_work += (FRESH if self._mean_work else 1.0) * (hint.work - self._mean_work)
            _meet(self._loras, hint.loras)
            _meet(self._sizes, (hint.size,))

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Counts a request for as long as it is here."""
        with self._lock:
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1

    def autoscaling(self, load: Load, pace: float) -> dict[str, float]:
        """For app.autoscaling.WorkPolicy: seconds of work left, of how many requests, seconds of a mean request, and
        the share of what the replica can do that is in use."""
        return {
            "seconds_left": load.work_left * pace,
            "requests": float(self._requests),
            "request_s": self._mean_work * pace,
            "busy": busy(load, pace),
        }

    def routing(self, load: Load, pace: float) -> dict[str, Any]:
        """For app.routing.WorkRouter."""
        with self._lock:
            met = {"loras": list(self._loras), "sizes": list(self._sizes)}
        return {"work_left": float(load.work_left), "seconds_per_work": pace} | met


def busy(load: Load, pace: float) -> float:
    """The share of an engine's throughput that is in use: what a unit of work takes in full forwards, over what it
    takes in those of now. A half-full forward does more than half of a full one's work, where it has a fixed part."""
    if not load.work_left or not load.seconds_per_work:
        return 0.0
    return min(1.0, pace / load.seconds_per_work)


def _meet(met: dict[str, None], names: tuple[str, ...]) -> None:
    for name in names:
        met.pop(name, None)
        met[name] = None
    while len(met) > KEPT:
        del met[next(iter(met))]
