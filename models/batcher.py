"""Who shares the next forward: the most urgent, and then everyone compatible who fits under a measured cap."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

Shape = tuple[int, int, int]


class Candidate(Protocol):
    """What the batcher looks at: the latents' shape, the rows it would take, and its urgency (smaller is first)."""

    @property
    def shape(self) -> Shape: ...
    @property
    def rows(self) -> int: ...
    @property
    def urgency(self) -> tuple[bool, float]: ...


C = TypeVar("C", bound=Candidate)


def knee(seconds: dict[int, float], worth: float = 0.1) -> int:
    """The smallest row count whose rows per second come within `worth` of the best; a bigger batch only delays.

    `seconds` maps a row count to the seconds one forward of so many rows takes.
    """
    best = max(rows / time for rows, time in seconds.items())
    return min(rows for rows, time in seconds.items() if rows / time >= (1 - worth) * best)


class Batcher:
    """Chooses batches under caps in rows, one per latent shape; a shape never measured is judged by its area."""

    def __init__(self, default_cap: int = 16):
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
        """The next batch; empty where there is no candidate. The most urgent one is always in it."""
        ordered = sorted(candidates, key=lambda candidate: candidate.urgency)
        if not ordered:
            return []
        room = self.cap(ordered[0].shape)
        batch: list[C] = []
        for candidate in ordered:
            if candidate.shape == ordered[0].shape and (candidate.rows <= room or not batch):
                batch.append(candidate)
                room -= candidate.rows
        return batch


def _area(shape: Shape) -> int:
    return shape[1] * shape[2]
