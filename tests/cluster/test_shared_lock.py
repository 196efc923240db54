"""A lock that many hold together or one alone, in threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress

from cluster.shared_lock import SharedLock

SOON_S, NEVER_S = 10.0, 0.3


class Holder:
    """Somebody who takes the lock in a thread of its own, and holds it until told."""

    def __init__(self, threads: ThreadPoolExecutor, way: AbstractContextManager[None]):
        self._has, self._over = threading.Event(), threading.Event()
        self._held = threads.submit(self._hold, way)

    def _hold(self, way: AbstractContextManager[None]) -> None:
        with way:
            self._has.set()
            assert self._over.wait(SOON_S)

    def has(self, within_s: float = SOON_S) -> bool:
        return self._has.wait(within_s)

    def over(self) -> None:
        self._over.set()
        self._held.result(SOON_S)


def test_many_share_it_and_one_has_it_alone():
    lock = SharedLock()
    with ThreadPoolExecutor() as threads:
        first, second = Holder(threads, lock.shared()), Holder(threads, lock.shared())
        assert first.has()
        assert second.has()
        alone = Holder(threads, lock.alone())
        first.over()
        assert not alone.has(NEVER_S)
        second.over()
        assert alone.has()
        late = Holder(threads, lock.shared())
        assert not late.has(NEVER_S)
        alone.over()
        assert late.has()
        late.over()


def test_who_wants_it_alone_keeps_later_ones_out():
    lock = SharedLock()
    with ThreadPoolExecutor() as threads:
        first = Holder(threads, lock.shared())
        assert first.has()
        alone = Holder(threads, lock.alone())
        assert not alone.has(NEVER_S)
        later = Holder(threads, lock.shared())
        assert not later.has(NEVER_S)
        first.over()
        assert alone.has()
        assert not later.has(NEVER_S)
        alone.over()
        assert later.has()
        later.over()


def test_a_fault_gives_it_back():
    lock = SharedLock()
    for way in (lock.shared, lock.alone):
        with suppress(ZeroDivisionError), way():
            raise ZeroDivisionError
    with lock.alone():
        pass
