"""How far a batch job is: a bar in a terminal, and elsewhere, as in a job's log, a line every few seconds."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

TELL_S = 5.0  # between two lines


class Telling:
    """Tells of `total` rows, of which `done` are there from earlier runs."""

    def __init__(self, total: int, done: int, console: Console):
        self._console, self._total, self._done = console, total, done
        self._before, self._began, self._told = done, time.monotonic(), time.monotonic()
        self.pictures = self.errors = 0
        counts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*counts, *times, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("rows", total=total, completed=done, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, rows: int, pictures: int, errors: int) -> None:
        """So many rows more are done, with so many pictures and errors."""
        self._done, self.pictures, self.errors = self._done + rows, self.pictures + pictures, self.errors + errors
        self._bar.update(self._task, completed=self._done, rate=f"{self._rate():.1f} rows/s")
        if not self._console.is_terminal and time.monotonic() - self._told >= TELL_S:
            self._told = time.monotonic()
            self._console.print(self.line(), highlight=False, soft_wrap=True)

    def line(self) -> str:
        """How far it is, in words."""
        rate = self._rate()
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate and self._done < self._total else ""
        errors = f", {self.errors} errors" if self.errors else ""
        return f"{self._done} of {self._total} rows, {rate:.2f} a second{left}{errors}"

    def _rate(self) -> float:
        """Rows a second, of this run."""
        return (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)
