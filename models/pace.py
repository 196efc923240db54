"""Pace: how long a device takes for work, measured when an engine warms up, corrected ever since. No torch."""

import math
from collections.abc import Mapping

import numpy as np

from models.work import SHALLOW

_KEPT = 0.95  # of what earlier turns told: the last twenty or so count
_SEED_TURNS = 10  # for so many turns the first measurement counts
_STRIDE = 0.05  # the part by which a forward moves what is known of those as broad as it


class Pace:
    """Seconds of forwards by their breadth, which is the row positions (models.work) of all that share one.

    The curve matters as much as the pace: a GPU takes hardly longer for eight rows than for one, a processor eight
    times as long. It is measured when an engine warms up, perhaps on a machine that is busy starting, and follows the
    forwards from then on. Before `learn` each row position is taken to cost the same, and how much is not known before
    the first turn.
    """

    def __init__(self) -> None:
        self._breadths = self._told = self._seconds = np.empty(0)
        self._usual, self._full = 1.0, math.inf
        self._share = SHALLOW
        self._took = self._expected = 0.0  # seconds, of late

    def learn(self, seconds: Mapping[float, float], usual: float, full: float) -> None:
        """Takes over measured seconds by breadth. `usual` is the breadth of one plain picture, `full` that beyond which
        forwards are not made broader."""
        self._breadths = np.array(sorted(seconds))
        self._told = np.array([seconds[breadth] for breadth in sorted(seconds)])
        self._usual, self._full = usual, full
        self._level()
        self._took = self._expected = _SEED_TURNS * self.forward_s(usual)

    def forward_s(self, breadth: float, shallow: bool = False) -> float:
        """Seconds of a forward as last known; before `learn`, a number that grows with it, good for comparisons. A
        shallow one (models.deep_cache) takes a part of what as broad a one of the whole network does."""
        if shallow:
            return self._share * self.forward_s(breadth)
        if not len(self._breadths):
            return breadth
        if breadth >= self._breadths[-1]:
            return float(self._seconds[-1] * breadth / self._breadths[-1])
        return float(np.interp(breadth, self._breadths, self._seconds))

    @property
    def plain_s(self) -> float:
        """Seconds of a forward of one plain picture."""
        return self.forward_s(self._usual)

    def note(self, breadth: float, beside: float, took_s: float, shallow: bool = False) -> None:
        """A turn with a forward of that breadth, 0 for none, and so much work beside it, has taken so long, as compared
        with what models.work reckons."""
        if breadth + beside <= 0:
            return
        like = breadth or self._usual
        expected = self.forward_s(like) / like * ((SHALLOW if shallow else 1.0) * breadth + beside)
        self._took = _KEPT * self._took + took_s
        self._expected = _KEPT * self._expected + expected

    def follow(self, breadth: float, took_s: float, shallow: bool = False) -> None:
        """A forward of that breadth has taken so long.

        Moves the curve beside it, by a fixed part: it is the median of the forwards that counts, so a single slow one,
        as when a sampler is first used, is as good as nothing. A shallow one moves the part that such take.
        """
        if not len(self._breadths):
            return
        if shallow:
            self._share = min(1.0, self._share * math.exp(_STRIDE * np.sign(took_s - self.forward_s(breadth, True))))
            return
        near = np.array([np.interp(breadth, self._breadths, hat) for hat in np.eye(len(self._breadths))])
        moved = self._seconds * np.exp(_STRIDE * near * np.sign(took_s - self.forward_s(breadth)))
        self._told = np.where(near > 0, moved, self._told)
        self._level()

    def _level(self) -> None:
        """A broader forward never takes less; where it seems to, the narrower one was disturbed."""
        self._seconds = np.maximum.accumulate(self._told)

    def seconds_per_work(self, breadth: float) -> float:
        """While so many row positions would share a forward; an idle device is told of as if it had a plain picture.
        0 where nothing is known yet."""
        if not self._expected:
            return 0.0
        like = min(max(breadth, self._usual), self._full)
        each = self.forward_s(like) / like if len(self._breadths) else 1.0
        return self._took / self._expected * each
