"""Runner: claims jobs, has them made, and brings the results. Knows neither Ray nor HTTP.

Several may work on one database. Whatever happens to a runner, its jobs are not lost: one that stops hands them back,
and those of one that is gone are queued again by the others when their leases have run out.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from app.errors import ReplicaDied, is_retryable
from app.jobs.attempt import Attempt, Ended, NotNow
from app.jobs.failures import FAULT, job_error
from app.jobs.job import Claim, Job, Stale
from app.jobs.store import JobStore
from models.errors import DeadlineTooShort, GenerationFailed, HeliographError, Unavailable

COMMIT_PAUSE_S = 0.5  # between two tries to write an end down while the database is away
REAPED_AT_ONCE, PRUNED_AT_ONCE = 100, 500
_HOUR_S, _DAY_S = 3600.0, 24 * 3600.0

Make = Callable[[Attempt], Coroutine[Any, Any, Mapping[str, Any]]]
Write = Callable[[], Awaitable[Job]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often a runner does what, in seconds, and how many jobs of a model it works on at a time.

    `backoff_s` are the pauses after a job's first errors, before it is queued again. Jobs lose their data `keep_s`
    after their end, and are forgotten after `forget_s`.
    """

    at_once: int = 8
    lease_s: float = 10.0
    beat_s: float = 1.0  # between heartbeats, of which a lease has to outlast several
    look_s: float = 0.25  # between two looks into an empty queue
    reap_s: float = 1.0
    prune_s: float = 600.0
    backoff_s: tuple[float, ...] = (2.0, 10.0)
    keep_s: float = 7 * _DAY_S
    forget_s: float = 30 * _DAY_S


class Runner:
    """`run` works until `stop`. `make` turns an attempt into its job's result."""

    def __init__(self, name: str, jobs: JobStore, make: Make, pace: Pace | None = None):
        self._name, self._jobs, self._make = name, jobs, make
        self._pace = pace or Pace()
        self._models: tuple[str, ...] = ()
        self._attempts: dict[str, Attempt] = {}
        self._unsure = False  # whether a claim may have happened whose answer was lost
        self._reaped_at = time.monotonic()
        self._changed = asyncio.Event()  # there may be something to claim
        self._stopping = asyncio.Event()

    def offer(self, models: Sequence[str]) -> None:
        """The models whose jobs are claimed from now on."""
        self._models = tuple(models)

    def stop(self) -> None:
        """Nothing more is claimed; what is under way is handed back, and `run` returns."""
        self._stopping.set()
        self._changed.set()
        for attempt in self._attempts.values():
            attempt.end("released")

    async def run(self) -> None:
        """Claims and works. Cancelling it leaves its jobs to their leases."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._every(self._pace.beat_s, self._beat))
            tasks.create_task(self._every(self._pace.reap_s, self._reap))
            tasks.create_task(self._every(self._pace.prune_s, self._prune))
            while not self._stopping.is_set():
                self._changed.clear()
                claims = await self._claim()
                for claim in claims:
                    attempt = self._attempts[claim.id] = Attempt(claim, self._pace.lease_s)
                    tasks.create_task(self._attend(attempt))
                if self._stopping.is_set():  # while it claimed
                    self.stop()
                elif not claims:
                    await _within(self._pace.look_s, self._changed)

    async def _claim(self) -> tuple[Claim, ...]:
        """As many as there is room for with each of the models that have room."""
        running = Counter(attempt.job.model for attempt in self._attempts.values())
        rooms = {model: room for model in self._models if (room := self._pace.at_once - running[model]) > 0}
        try:
            if self._unsure:
                await self._jobs.hand_back(self._name, tuple(self._attempts))
                self._unsure = False
            if not rooms:
                return ()
            return await self._jobs.claim(self._name, tuple(rooms), min(rooms.values()), self._pace.lease_s)
        except Unavailable as away:
            self._unsure = True
            _log.warning("no jobs can be claimed: %s", away)
            await _within(self._pace.reap_s, self._stopping)
            return ()

    async def _attend(self, attempt: Attempt) -> None:
        """Stays with an attempt until its end is written down, or it is another's."""
        try:
            write = await self._outcome(attempt)
            while write is not None and attempt.ending != "lost":
                try:
                    await write()
                    return
                except Stale:
                    return
                except Unavailable:
                    await asyncio.sleep(COMMIT_PAUSE_S)
        finally:
            if self._attempts.get(attempt.claim.id) is attempt:  # it may have been claimed anew already
                del self._attempts[attempt.claim.id]
            self._changed.set()

    async def _outcome(self, attempt: Attempt) -> Write | None:
        """What is to be written down of the attempt, None where nothing may be."""
        jobs, claim = self._jobs, attempt.claim
        try:
            result = await attempt.unless_ended(self._tried(attempt))
        except Ended:
            ends = {"cancelled": jobs.cancelled, "released": jobs.release}
            return partial(ends[attempt.ending], claim) if attempt.ending in ends else None
        except Stale:
            return None
        except NotNow:
            return partial(jobs.release, claim)
        except ReplicaDied as death:
            return partial(jobs.died, claim, job_error(death))
        except HeliographError as error:
            if claim.job.deadline_at is not None and _too_late(error):
                return partial(jobs.expire, claim)
            return partial(jobs.fail, claim, job_error(error), retry=is_retryable(error))
        except Exception:
            _log.exception("job %s met a mistake of ours", claim.id)
            return partial(jobs.fail, claim, FAULT, retry=False)
        return partial(jobs.succeed, claim, result)

    async def _tried(self, attempt: Attempt) -> Mapping[str, Any]:
        """The result; before an error that another attempt may mend, a pause, so that it is not the same again."""
        try:
            return await self._make(attempt)
        except ReplicaDied:
            raise
        except HeliographError as error:
            pauses = self._pace.backoff_s[attempt.job.failures :]
            if is_retryable(error) and pauses:
                await asyncio.sleep(pauses[0] * random.uniform(0.8, 1.2))
            raise

    async def _every(self, pause_s: float, work: Callable[[], Awaitable[None]]) -> None:
        """Until the runner stops."""
        while not await _within(pause_s, self._stopping):
            try:
                await work()
            except Unavailable as away:
                _log.warning("the database is away: %s", away)

    async def _beat(self) -> None:
        """Keeps the leases, tells the progress, and hears what is to end."""
        attempts = tuple(self._attempts.values())
        if not attempts:
            return
        progress = {a.claim.id: a.progress for a in attempts if a.progress is not None}
        heard = await self._jobs.heartbeat([a.claim for a in attempts], self._pace.lease_s, progress)
        for attempt in attempts:
            if attempt.claim.id in heard.lost:
                attempt.end("lost")
            elif attempt.claim.id in heard.cancel:
                attempt.end("cancelled")

    async def _reap(self) -> None:
        found = REAPED_AT_ONCE
        while found >= REAPED_AT_ONCE:
            reaped = await self._jobs.reap(REAPED_AT_ONCE, self._reaped_at)
            self._reaped_at = time.monotonic()
            found = len(reaped.queued) + len(reaped.ended)
            if reaped.queued:
                self._changed.set()

    async def _prune(self) -> None:
        touched = PRUNED_AT_ONCE
        while touched >= PRUNED_AT_ONCE:
            touched = await self._jobs.prune(self._pace.keep_s, self._pace.forget_s, PRUNED_AT_ONCE)


def _too_late(error: HeliographError) -> bool:
    """Whether the deadline has passed, or will have before the job could be done."""
    missed = isinstance(error, GenerationFailed) and error.reason == "deadline"
    return missed or isinstance(error, DeadlineTooShort)


async def _within(seconds: float, event: asyncio.Event) -> bool:
    """Whether the event came within that time."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
