"""Requests by id while they are alive in this process, so that each can be told how to end before its time.

A request is alive in the gateway that answers it and in the replica that works on it. The register belongs to the
process because Ray can ask a process that no Serve handle leads to any more: one that drains.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.events import Ending

Listener = Callable[[Ending], None]  # called from any thread

_alive: dict[str, tuple[Listener, ...]] = {}


@contextmanager
def alive(id: str, listener: Listener) -> Iterator[None]:
    """For as long as the request is alive here, the listener hears how it is to end."""
    _alive[id] = (*_alive.get(id, ()), listener)
    try:
        yield
    finally:
        _alive[id] = tuple(other for other in _alive[id] if other is not listener)
        if not _alive[id]:
            del _alive[id]


def end(ending: Ending, id: str) -> bool:
    """Tells a request how to end. False where none of that id is alive in this process."""
    listeners = _alive.get(id, ())
    for listener in listeners:
        listener(ending)
    return bool(listeners)
