"""Takes webhooks out of the outbox and posts them, again and again over three days where it must.

A receiver that is slow or dead keeps a few attempts busy for a quarter of a minute and nobody else: what is due to an
origin that is being posted to is not claimed, so at no time more than PER_ORIGIN attempts wait for one.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Mapping
from typing import Protocol

from app.fetch import Response, Unreachable
from app.webhooks import signing
from app.webhooks.outbox import Delivery, Outbox
from models.errors import HeliographError, InvalidRequest

AT_ONCE, PER_ORIGIN = 64, 4
TIMEOUT_S = 15.0  # of an attempt
LEASE_S = 60.0  # of a claim: far longer than an attempt
IDLE_S = 1.0  # between two looks into an outbox where nothing was due
_MINUTE, _HOUR = 60.0, 3600.0
# After each failed attempt; the example of Standard Webhooks. Ten attempts over 75 hours.
DELAYS_S = (5, 5 * _MINUTE, 30 * _MINUTE, 2 * _HOUR, 5 * _HOUR, 10 * _HOUR, 14 * _HOUR, 20 * _HOUR, 24 * _HOUR)
JITTER = 0.1  # of a delay, either way, so that a receiver that comes back is not met by all at once
_BUSY_STATUSES = (429, 503)
_GONE = 410
_ORIGIN = re.compile(r"[^/]*//[^/?#]*")

_log = logging.getLogger(__name__)


class Poster(Protocol):
    """What the deliverer needs of app/fetch.py's Fetcher."""

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float) -> Response: ...


def retry_in_s(attempts: int, retry_after_s: float | None = None) -> float | None:
    """Seconds from a failed attempt, the `attempts`-th, to the next; None after the last.

    A receiver may ask for more patience (Retry-After), up to the longest delay that there is.
    """
    if attempts > len(DELAYS_S):
        return None
    delay = DELAYS_S[attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    return max(delay, min(retry_after_s or 0.0, DELAYS_S[-1]))


class Deliverer:
    """`run` delivers until `stop`; several may work on one outbox."""

    def __init__(self, outbox: Outbox, poster: Poster):
        self._outbox = outbox
        self._poster = poster
        self._under_way: dict[str, int] = {}  # attempts by origin
        self._changed = asyncio.Event()
        self._stopping = False

    def stop(self) -> None:
        """Nothing more is claimed; `run` returns once the attempts under way have ended."""
        self._stopping = True
        self._changed.set()

    async def run(self) -> None:
        """Delivers what is due. Cancelling it drops the attempts under way, which are due again after their lease."""
        async with asyncio.TaskGroup() as attempts:
            while not self._stopping:
                claimed = await self._claim()
                for delivery in claimed:
                    origin = _origin(delivery.url)
                    self._under_way[origin] = self._under_way.get(origin, 0) + 1
                    attempts.create_task(self._deliver(delivery, origin))
                if not claimed:
                    await self._pause()

    async def _claim(self) -> list[Delivery]:
        free = min(PER_ORIGIN, AT_ONCE - sum(self._under_way.values()))
        if free <= 0:
            return []
        try:
            return list(await self._outbox.claim_due(free, LEASE_S, tuple(self._under_way)))
        except HeliographError as away:
            _log.warning("no webhooks can be claimed: %s", away)
            return []

    async def _pause(self) -> None:
        """Until an attempt has ended, or it is time to look for new deliveries."""
        try:
            async with asyncio.timeout(IDLE_S):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    async def _deliver(self, delivery: Delivery, origin: str) -> None:
        try:
            await self._attempt(delivery)
        except HeliographError as away:
            _log.warning("what became of webhook %s cannot be written down, it is due again: %s", delivery.id, away)
        finally:
            self._under_way[origin] -= 1
            if not self._under_way[origin]:
                del self._under_way[origin]
            self._changed.set()

    async def _attempt(self, delivery: Delivery) -> None:
        """One attempt, and what the outbox is told of it."""
        try:
            signed = signing.headers(delivery.id, int(time.time()), delivery.body, delivery.secrets)
            headers = {"content-type": "application/json", **signed}
            answer = await self._poster.post(delivery.url, headers, delivery.body, TIMEOUT_S)
        except Unreachable as gone:
            await self._outbox.failed(delivery.id, None, str(gone), retry_in_s(delivery.attempts))
        except InvalidRequest as hopeless:
            await self._outbox.failed(delivery.id, None, str(hopeless), None)
        else:
            await self._report(delivery, answer)

    async def _report(self, delivery: Delivery, answer: Response) -> None:
        if 200 <= answer.status < 300:
            await self._outbox.delivered(delivery.id, answer.status)
        elif answer.status == _GONE:
            await self._outbox.disable(delivery.id)
        else:
            patience = answer.retry_after_s if answer.status in _BUSY_STATUSES else None
            error = "redirects are not followed" if 300 <= answer.status < 400 else "the receiver did not take it"
            await self._outbox.failed(delivery.id, answer.status, error, retry_in_s(delivery.attempts, patience))


def _origin(url: str) -> str:
    """Scheme and authority as they stand; of what is no address, nothing: the attempt will say what is wrong."""
    found = _ORIGIN.match(url)
    return found[0] if found else ""
