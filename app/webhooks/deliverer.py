"""Takes webhooks out of the outbox and posts them, again and again over three days where it must.

A receiver that is slow or dead keeps a few attempts busy for a quarter of a minute and nobody else: no more than
PER_ORIGIN of the outbox are under way to one, and nothing is claimed that would have to wait.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

from app.fetch import Response, Unreachable
from app.jobs.outbox import Delivery, Outbox
from app.webhooks import signing
from models.errors import HeliographError, InvalidRequest

AT_ONCE = 64
TIMEOUT_S = 15.0  # of an attempt
LEASE_S = 60.0  # of a claim: far longer than an attempt
DRAIN_S = 20.0  # longer than an attempt, and what is written of it
IDLE_S = 1.0  # between two looks into an outbox where nothing was due
_MINUTE, _HOUR = 60.0, 3600.0
# After each failed attempt; the example of Standard Webhooks. Ten attempts over 75 hours.
DELAYS_S = (5, 5 * _MINUTE, 30 * _MINUTE, 2 * _HOUR, 5 * _HOUR, 10 * _HOUR, 14 * _HOUR, 20 * _HOUR, 24 * _HOUR)
ATTEMPTS = 1 + len(DELAYS_S)
JITTER = 0.1  # of a delay, either way, so that a receiver that comes back is not met by all at once
_BUSY_STATUSES = (429, 503)
_GONE = 410

_log = logging.getLogger(__name__)


class Poster(Protocol):
    """What the deliverer needs of app/fetch.py's Fetcher."""

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float) -> Response: ...


def retry_in_s(attempts: int, retry_after_s: float | None = None) -> float | None:
    """Seconds from a failed attempt, the `attempts`-th, to the next; None after the last.

    A receiver may ask for more patience (Retry-After), up to the longest delay that there is.
    """
    if attempts >= ATTEMPTS:
        return None
    delay = DELAYS_S[attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    return max(delay, min(retry_after_s or 0.0, DELAYS_S[-1]))


class Deliverer:
    """`run` delivers until `stop`. Several may work on one outbox, in any process.

    `timeout_s` is an attempt's. `lease_s` is a claim's, and longer: so no two send one webhook at the same time.
    """

    def __init__(self, outbox: Outbox, poster: Poster, timeout_s: float = TIMEOUT_S, lease_s: float = LEASE_S):
        assert timeout_s < lease_s
        self._outbox = outbox
        self._poster = poster
        self._timeout_s, self._lease_s = timeout_s, lease_s
        self._under_way: Counter[str] = Counter()  # attempts by origin
        self._changed = asyncio.Event()
        self._stopping = False
        self._drain_s = DRAIN_S

    def stop(self, drain_s: float = DRAIN_S) -> None:
        """Nothing more is claimed. What is under way has so long to end; then `run` returns, and drops the rest."""
        self._stopping, self._drain_s = True, drain_s
        self._changed.set()

    async def run(self) -> None:
        """Delivers what is due. What is dropped, here or by cancelling this, is due again after its lease.

        Raises only what is a mistake of ours.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as drain, asyncio.TaskGroup() as attempts:
                while not self._stopping:
                    latest = time.monotonic() + self._lease_s - self._timeout_s
                    claimed = await self._claim()
                    for delivery in claimed:
                        self._under_way[delivery.origin] += 1
                        attempts.create_task(self._deliver(delivery, latest))
                    if not claimed:
                        await self._pause()
                drain.reschedule(asyncio.get_running_loop().time() + self._drain_s)

    async def _claim(self) -> tuple[Delivery, ...]:
        free = AT_ONCE - self._under_way.total()
        if not free:
            return ()
        try:
            return await self._outbox.claim_due(free, self._lease_s, self._under_way)
        except HeliographError as away:
            _log.warning("no webhooks can be claimed: %s", away)
            return ()

    async def _pause(self) -> None:
        """Until an attempt has ended, or it is time to look for new deliveries."""
        try:
            async with asyncio.timeout(IDLE_S):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    async def _deliver(self, delivery: Delivery, latest: float) -> None:
        """An attempt, unless it could outlive the lease because this process stood still: another may have begun."""
        try:
            if time.monotonic() <= latest:
                await self._attempt(delivery)
        except HeliographError as away:
            _log.warning("what became of webhook %s cannot be written down, it is due again: %s", delivery.id, away)
        finally:
            self._under_way[delivery.origin] -= 1
            self._under_way += Counter()  # forgets those that have none
            self._changed.set()

    async def _attempt(self, delivery: Delivery) -> None:
        """One attempt, and what the outbox is told of it. One of which nothing is ever told is not made for ever."""
        if delivery.attempts > ATTEMPTS:
            await self._outbox.failed(delivery, None, f"none of {ATTEMPTS} attempts came to its end", None)
            return
        try:
            signed = signing.headers(delivery.id, int(time.time()), delivery.body, delivery.secrets)
            headers = {"content-type": "application/json", **signed}
            answer = await self._poster.post(delivery.url, headers, delivery.body, self._timeout_s)
        except Unreachable as gone:
            await self._outbox.failed(delivery, None, str(gone), retry_in_s(delivery.attempts))
        except InvalidRequest as hopeless:
            await self._outbox.failed(delivery, None, str(hopeless), None)
        else:
            await self._report(delivery, answer)

    async def _report(self, delivery: Delivery, answer: Response) -> None:
        if 200 <= answer.status < 300:
            await self._outbox.delivered(delivery, answer.status)
        elif answer.status == _GONE:
            await self._outbox.disable(delivery, answer.status, "the receiver wants no more webhooks at this address")
        else:
            patience = answer.retry_after_s if answer.status in _BUSY_STATUSES else None
            error = "redirects are not followed" if 300 <= answer.status < 400 else "the receiver did not take it"
            await self._outbox.failed(delivery, answer.status, error, retry_in_s(delivery.attempts, patience))
