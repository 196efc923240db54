"""Pace: how long a device takes for work, measured when an engine warms up, corrected by every turn since. No torch."""

import math
from collections.abc import Mapping

import numpy as np

_KEPT = 0.95  # of what earlier turns told: the last twenty or so count
_SEED_TURNS = 10  # for so many turns the first measurement counts


class Pace:
    """Seconds of forwards by their breadth, which is the row positions (models.work) of all that share one.

    The curve matters as much as the pace: a GPU takes hardly longer for eight rows than for one, a processor eight
    times as long. Before `learn` each row position is taken to cost the same, and how much is not known before the
    first turn.
    """

    def __init__(self) -> None:
        self._breadths: np.ndarray = np.empty(0)
        self._seconds: np.ndarray = np.empty(0)
        self._usual, self._full = 1.0, math.inf
        self._took = self._expected = 0.0  # seconds, of late

    def learn(self, seconds: Mapping[float, float], usual: float, full: float) -> None:
        """Takes over measured seconds by breadth. `usual` is the breadth of one plain picture, `full` that beyond which
        forwards are not made broader."""
        self._breadths = np.array(sorted(seconds))
        # A broader forward never takes less; where it seems to, the narrower one was disturbed.
        self._seconds = np.maximum.accumulate([seconds[breadth] for breadth in sorted(seconds)])
        self._usual, self._full = usual, full
        self._took = self._expected = _SEED_TURNS * self.forward_s(usual)

    def forward_s(self, breadth: float) -> float:
        """Seconds of a forward as measured; before that, a number that grows with it and is good for comparisons."""
        if not len(self._breadths):
            return breadth
        if breadth >= self._breadths[-1]:
            return float(self._seconds[-1] * breadth / self._breadths[-1])
        return float(np.interp(breadth, self._breadths, self._seconds))

    def note(self, breadth: float, beside: float, took_s: float) -> None:
        """A turn with a forward of that breadth, 0 for none, and so much work beside it, has taken so long."""
        if breadth + beside <= 0:
            return
        like = breadth or self._usual
        expected = self.forward_s(like) / like * (breadth + beside)
        self._took = _KEPT * self._took + took_s
        self._expected = _KEPT * self._expected + expected

    def seconds_per_work(self, breadth: float) -> float:
        """While so many row positions would share a forward; an idle device is told of as if it had a plain picture.
        0 where nothing is known yet."""
        if not self._expected:
            return 0.0
        like = min(max(breadth, self._usual), self._full)
        return self._took / self._expected * self.forward_s(like) / like
