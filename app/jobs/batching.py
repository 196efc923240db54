"""Batches: what a dialect may ask of them. Each method acts for the current caller; an administrator sees all."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from app.jobs import inputs
from app.jobs.batches import Batch, BatchSubmission, Line, NewLine
from app.jobs.job import Idempotency, NewJob
from app.jobs.store import JobStore
from app.keys.caller import current
from app.stores.store import Store
from models.errors import InvalidRequest, NotFound, Overloaded
from models.request import EffectiveRequest

if TYPE_CHECKING:
    from app.jobs.service import Delivery

PAGE = 50  # lines that are read at a time

GiveBack = Callable[[], Awaitable[object]]
Charge = Callable[[EffectiveRequest], Awaitable[GiveBack]]
# The job of a request to draw, whose pictures are stored by then, and the keys of these.
Promise = Callable[[str, EffectiveRequest, "Delivery"], Awaitable[tuple[NewJob, tuple[str, ...]]]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a line asks for, under its caller's name for it; `url` is the path that would have answered it at once."""

    custom_id: str
    url: str
    request: EffectiveRequest
    delivery: "Delivery"


@contextmanager
def naming(line: int) -> Iterator[None]:
    """What is found wrong in here is wrong with a line, from 1: the error's field says so."""
    try:
        yield
    except InvalidRequest as wrong:
        raise InvalidRequest(f"lines.{line}.{wrong.field}", wrong.message) from wrong
    except NotFound as unknown:
        raise InvalidRequest(f"lines.{line}", unknown.message) from unknown


class Batches:
    """Many jobs that are accepted and asked about together."""

    def __init__(self, jobs: JobStore, pictures: Store, charge: Charge, promise: Promise):
        self._jobs, self._pictures, self._charge, self._promise = jobs, pictures, charge, promise

    @property
    def most(self) -> int:
        """How many lines a batch may have: no more than may wait, which it would be told to come back with for ever."""
        bounds = self._jobs.bounds
        return min(bounds.lines_at_once, bounds.lines, bounds.lines_per_owner)

    async def earlier(self, idempotency: Idempotency) -> BatchSubmission | None:
        """The batch that this key has made before. Raises InvalidRequest where that was for another body."""
        return await self._jobs.earlier_batch(current.get().id, idempotency)

    async def submit(self, lines: Sequence[Asked], idempotency: Idempotency | None) -> BatchSubmission:
        """Accepts a job for each line, all or none; each costs what it would cost alone.

        Raises Overloaded, InvalidRequest naming the line, Unavailable.
        """
        owner = current.get().id
        await self._jobs.check_room_for_lines(owner, len(lines))  # before any picture is stored
        made, unneeded = False, True  # where a commit broke, nobody knows whether there is a batch
        stored = list[str]()
        charged: list[GiveBack] = []
        try:
            new = [await self._line(number, line, charged, stored) for number, line in enumerate(lines, 1)]
            unneeded = False
            found = await self._jobs.submit_batch(owner, new, idempotency)
            made, unneeded = not found.replayed, found.replayed
            return found
        except (Overloaded, InvalidRequest):
            unneeded = True
            raise
        finally:
            if not made:
                for give_back in charged:
                    await give_back()
            if unneeded:
                await inputs.drop(self._pictures, stored)

    async def _line(self, number: int, line: Asked, charged: list[GiveBack], stored: list[str]) -> NewLine:
        with naming(number):
            charged.append(await self._charge(line.request))
        job, keys = await self._promise("generate", line.request, line.delivery)
        stored += keys
        await asyncio.sleep(0)  # the loop is everybody's, and there may be thousands
        return NewLine(custom_id=line.custom_id, job=replace(job, request={**job.request, "url": line.url}))

    async def get(self, id: str) -> Batch:
        """One batch. Raises NotFound."""
        return await self._jobs.batch(id, owner())

    async def page(self, after: str | None, limit: int) -> tuple[Sequence[Batch], bool]:
        """The newest first, from the one after `after` on, and whether there are more. Raises NotFound."""
        found = await self._jobs.batches(owner(), after, limit)
        return found[:limit], len(found) > limit

    async def cancel(self, id: str) -> Batch:
        """Ends what waits, has stopped what runs; what is finished stays. Raises NotFound."""
        more = True
        while more:
            more = await self._jobs.cancel_lines(id, owner())
        return await self.get(id)

    async def finished_lines(self, id: str) -> AsyncGenerator[Line, None]:
        """The lines whose jobs have ended, in their order. Raises NotFound."""
        after = 0
        while page := await self._jobs.finished_lines(id, owner(), after, PAGE):
            for line in page:
                yield line
            after = page[-1].number


def owner() -> str | None:
    """Whose jobs the current caller sees; None where it is everybody's."""
    caller = current.get()
    return None if "admin" in caller.scopes else caller.id
