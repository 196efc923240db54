"""What the gateway hears from a replica besides the engine's own events."""

from dataclasses import dataclass
from typing import Literal

from app.origin import Origin
from models.events import Event
from models.images import ImageFormat

ModelState = Literal["cold", "loading", "ready", "failed", "missing"]
Ending = Literal["accept", "cancel"]  # how a running request may be made to end before its time


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """The engine took the request on. `waiting` requests were before it; nothing of it can be refused from now on."""

    waiting: int
    origin: Origin


ReplicaEvent = Admitted | Event


@dataclass(frozen=True, kw_only=True)
class Upscaled:
    """A picture made larger: encoded, its size, and the upscaler that did it."""

    data: bytes
    format: ImageFormat
    width: int
    height: int
    model: str
