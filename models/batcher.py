"""Who shares the next forward: the most urgent, and then everyone compatible who fits under a measured cap. Whose next
step is shallow (models.deep_cache) goes before who is more urgent.

Where several keys have work alive, they take turns to lead, and do not slow each other down too far: models.turns.
"""

from collections.abc import Iterable

from models.pace import Pace
from models.turns import C, Shape, Turns


class Batcher:
    """Chooses batches under caps in rows, one per latent shape; a shape never measured is judged by its area."""

    def __init__(self, pace: Pace | None = None, default_cap: int = 16):
        self._turns = Turns(pace or Pace())
        self._default_cap = default_cap
        self._caps: dict[Shape, int] = {}

    def cap(self, shape: Shape) -> int:
        """The most rows of this shape that one forward is given."""
        if shape not in self._caps:
            if not self._caps:
                return self._default_cap
            nearest = min(self._caps, key=lambda known: abs(_area(known) - _area(shape)))
            return max(2, self._caps[nearest] * _area(nearest) // _area(shape))
        return self._caps[shape]

    def set_cap(self, shape: Shape, rows: int) -> None:
        """Sets the cap for a shape, measured or forced by memory."""
        self._caps[shape] = max(1, rows)

    def next(self, candidates: Iterable[C]) -> list[C]:
        """The next batch; empty where there is no candidate. One is in it in any case."""
        return self._turns.next(candidates, self.cap)


def _area(shape: Shape) -> int:
    return shape[1] * shape[2]
