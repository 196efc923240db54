"""Load: how busy an engine is. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Load:
    """Pictures that wait and that run, rows of those alive, forwards so far, and the work (models.work) that is left.

    `seconds_per_work` is what it takes at the moment, 0 where nothing was measured yet; an idle engine tells what it
    would take with one plain picture. `seconds_left` estimates when all that is there now will be done.
    """

    waiting: int
    running: int
    rows: int
    forwards: int
    work_left: float
    seconds_per_work: float

    @property
    def seconds_left(self) -> float:
        return self.work_left * self.seconds_per_work
