"""A shared lock: held by many together, or by one alone (Courtois, Heymans and Parnas, CACM 1971)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """For threads. Who wants it alone keeps later ones out, and waits for those who have it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing, self._alone = 0, False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Held together with others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Held by nobody else."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
            self._changed.wait_for(lambda: not self._sharing)
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()
