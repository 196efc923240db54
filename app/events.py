"""What the gateway hears from a replica besides the engine's own events."""

from dataclasses import dataclass
from typing import Literal

from app.origin import Origin
from models.errors import Unavailable
from models.events import Event
from models.images import ImageFormat

ModelState = Literal["cold", "loading", "ready", "failed", "missing"]
ASLEEP: tuple[ModelState, ...] = ("cold", "loading")  # a request wakes it, and waits
Ending = Literal["accept", "cancel"]  # how a running request may be made to end before its time


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """The engine took the request on. `waiting` requests were before it; nothing of it can be refused from now on.

    `seconds_per_work` is the engine's pace in full forwards, for work as in models/work.py.
    """

    waiting: int
    origin: Origin
    seconds_per_work: float = 0.0


ReplicaEvent = Admitted | Event


@dataclass(frozen=True, kw_only=True)
class Upscaled:
    """A picture made larger: encoded, its size, and the upscaler that did it.

    Once it is kept it has a receipt, and a key in the store where it was stored; `fault` is what kept it from that.
    """

    data: bytes
    format: ImageFormat
    width: int
    height: int
    model: str
    receipt_id: str | None = None
    keys: tuple[str, ...] = ()
    fault: Unavailable | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What could not be kept."""
        return not_kept(self.fault)


def not_kept(fault: Unavailable | None) -> tuple[str, ...]:
    """The warning of a result whose receipt or pictures could not be kept."""
    return () if fault is None else (f"the result is not kept whole: {fault.message}",)
