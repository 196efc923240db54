"""Attempt: one claimed job while a runner works on it: how far it is, how long there is, and how it is to end."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

from app.jobs.job import Claim, Job, JobProgress

T = TypeVar("T")

# lost: somebody else's by now, nothing may be written; cancelled: by its owner; released: the runner itself stops.
Ending = Literal["lost", "cancelled", "released"]


class Ended(Exception):
    """The attempt was ended from outside; `ending` of the attempt says how."""


class NotNow(Exception):
    """The job cannot be made here at the moment, which is no fault of its own: hand it back."""


class Attempt:
    """Belongs to one event loop. `lease_s` is how long the claim was good for when it was made."""

    def __init__(self, claim: Claim, lease_s: float):
        self.claim = claim
        self.progress: JobProgress | None = None
        self.ending: Ending | None = None
        self._ended = asyncio.Event()
        self._began = time.monotonic()
        self._lease_s = lease_s

    @property
    def job(self) -> Job:
        return self.claim.job

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline, None without one: by the database's clock at the claim, and ours since then."""
        if self.job.deadline_at is None or self.job.lease_until is None:
            return None
        claimed_at = self.job.lease_until - self._lease_s
        return self.job.deadline_at - claimed_at - (time.monotonic() - self._began)

    def end(self, ending: Ending) -> None:
        """How the attempt is to end. The first word counts, but what is lost is lost."""
        if self.ending is None or ending == "lost":
            self.ending = ending
        self._ended.set()

    async def unless_ended(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work gives. Where the attempt is ended first, the work is cancelled. Raises Ended then."""
        working = asyncio.ensure_future(work)
        ending = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Ended
            return working.result()
        finally:
            working.cancel()
            ending.cancel()
            await asyncio.gather(working, ending, return_exceptions=True)
