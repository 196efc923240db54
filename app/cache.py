"""Which requests draw the same, and how those under way at the same time are drawn once."""

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import orjson

from models import document
from models.errors import GenerationFailed
from models.metadata import named
from models.request import EffectiveRequest, GenerationRequest
from models.upscaler_card import LANCZOS

T = TypeVar("T")

_ORDER = ("priority", "deadline_s", "preview_every", "experiments")  # how it was ordered, not what it shows


def is_repeatable(request: GenerationRequest) -> bool:
    """Whether the caller has said everything that decides the pictures, so that they may be given out again.

    Not with an upscaling network, whose weights nobody hashes.
    """
    varied = request.variation_strength > 0 and request.variation_seed is None
    enlarged = request.upscale is not None and request.upscale.model != LANCZOS
    return request.seed is not None and not varied and not enlarged


def fingerprint(request: EffectiveRequest) -> str:
    """The same for requests that draw the same with the same weights: SHA-256 over every parameter, input pictures by
    their hashes."""
    told = {name: value for name, value in document.write(request, named).items() if name not in _ORDER}
    return hashlib.sha256(orjson.dumps(told, option=orjson.OPT_SORT_KEYS)).hexdigest()


async def fingerprint_aside(request: EffectiveRequest) -> str:
    """The same, in a thread where there are input pictures to hash, which may be large."""
    if any(document.pictures(request)):
        return await asyncio.to_thread(fingerprint, request)
    return fingerprint(request)


class Flights(Generic[T]):
    """Work under way in this process, by what it is about.

    Whoever works and fails or is cancelled is alone in that: the next of those who wait begins anew.
    """

    def __init__(self):
        self._flights: dict[str, asyncio.Future[T]] = {}

    async def joined(self, about: str, patience_s: float) -> T | None:
        """What somebody else's work gives; None where nobody is at it, and who asks is to `lead`, without awaiting
        anything before. Raises GenerationFailed for who has waited for so long."""
        try:
            async with asyncio.timeout(patience_s):
                while about in self._flights:
                    flight = self._flights[about]
                    await asyncio.wait({flight})
                    if not flight.cancelled():
                        return flight.result()
        except TimeoutError as late:
            raise GenerationFailed("deadline", "the pictures were not finished in time") from late
        return None

    @contextmanager
    def lead(self, about: str) -> Iterator[asyncio.Future[T]]:
        """Others wait for what the future is given; where it is given nothing, one of them begins anew."""
        flight = self._flights[about] = asyncio.get_running_loop().create_future()
        try:
            yield flight
        finally:
            del self._flights[about]
            flight.cancel()
