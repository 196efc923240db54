"""A line in the terminal that tells what is measured now, and how far that is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def telling(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """What is to be told: what is done now, how much of it is done, and of how much."""
    columns = (TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn twice a second: the bar must not take time from what it reports on.
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        task = progress.add_task("")

        def say(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield say
