"""How often a block of rows was begun: a row that takes its process with it would be begun again without end.

Nothing tells which of a block's rows ended the process, nor that the process was not ended for a reason of its own. So
a block that was begun several times is drawn row by row, and a row that was begun alone several times is given up.
"""

from cluster.place import Place

BEGUN = "begun"
TOGETHER, ALONE = 3, 2  # beginnings of a block, and of a row alone


class Beginnings:
    """Kept in the place of the job, for the processes that come after this one. All of it raises StoreUnavailable."""

    def __init__(self, place: Place):
        self._place = place

    def together(self, first: int) -> bool:
        """Notes that the block with that first row is begun. False where its rows are to be drawn one by one."""
        return self._noted(_block(first)) <= TOGETHER

    def alone(self, number: int) -> bool:
        """Notes that a row is begun alone. False where it has been often enough."""
        return self._noted(_row(number)) <= ALONE

    def over(self, first: int) -> None:
        """The block has come to its end."""
        self._place.delete(_block(first))

    def over_alone(self, number: int) -> None:
        """The row has."""
        self._place.delete(_row(number))

    def forget(self) -> None:
        """The job has, with what was left by those who did not."""
        self._place.delete(*self._place.names(BEGUN))

    def _noted(self, name: str) -> int:
        times = int(self._place.get(name) or 0) + 1
        self._place.put(name, str(times).encode(), "text/plain")
        return times


def _block(first: int) -> str:
    return f"{BEGUN}/{first:09d}"


def _row(number: int) -> str:
    return f"{BEGUN}/{number:09d}-alone"
