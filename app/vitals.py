"""What a replica tells Serve of itself: to the autoscaler how much there is to do, to routers what it is warm for."""

import threading
from typing import Any

from app.hint import Hint
from models.load import Load

FRESH = 0.1  # of the mean work of a request, what the latest one counts
KEPT = 64  # names and sizes that were met lately, of each
# The part of a full forward's time that an empty one would take. The cap in rows is where more rows gain less than a
# tenth (models/batcher.py, knee); for a time that grows by a fixed part and one for each row this is about that point.
FIXED = 0.2


class Vitals:
    """Of one replica. Requests are noted from any thread, stats are asked for by Serve."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mean_work = 0.0
        self._loras: dict[str, None] = {}  # in the order in which they were met last
        self._sizes: dict[str, None] = {}

    def note(self, hint: Hint) -> None:
        """Remembers a request that was taken on."""
        with self._lock:
            self._mean_work += (FRESH if self._mean_work else 1.0) * (hint.work - self._mean_work)
            _meet(self._loras, hint.loras)
            _meet(self._sizes, (hint.size,))

    def autoscaling(self, load: Load) -> dict[str, float]:
        """For app.autoscaling.WorkPolicy: seconds of work left, of how many pictures, seconds of a mean request, and
        the share of what the replica can do that is in use."""
        return {
            "seconds_left": float(load.seconds_left),
            "pictures": float(load.waiting + load.running),
            "request_s": self._mean_work * load.seconds_per_work,
            "busy": busy(load.batches),
        }

    def routing(self, load: Load) -> dict[str, Any]:
        """For app.routing.WorkRouter."""
        with self._lock:
            met = {"loras": list(self._loras), "sizes": list(self._sizes)}
        return {"work_left": float(load.work_left), "seconds_per_work": load.seconds_per_work} | met


def busy(batches: float) -> float:
    """The share of an engine's throughput in use while its forwards are this full: 0 for none, 1 for full ones.

    Half-full forwards do more than half of the work, because a forward has a fixed part.
    """
    filled = min(1.0, batches)
    return filled * (1 + FIXED) / (filled + FIXED)


def _meet(met: dict[str, None], names: tuple[str, ...]) -> None:
    for name in names:
        met.pop(name, None)
        met[name] = None
    while len(met) > KEPT:
        del met[next(iter(met))]
