"""How a job comes to be: its idempotency key, the bound of the queue, its place among its owner's and the others'."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import clock, one_at_a_time
from app.jobs.job import Idempotency, NewJob, Submission
from app.jobs.journal import job_of, new_id, record
from app.jobs.reading import get
from app.jobs.states import State
from app.jobs.tables import ALONE, LINE, QUEUED, SERVED, idempotency, jobs
from models.errors import InvalidRequest, Overloaded

_AGAIN = (State.FAILED, State.CANCELLED, State.EXPIRED)
SUBMITTED = {"state": State.QUEUED, "attempt": 0, "reason": "submitted"}  # a job's first event
_LONGEST_WAIT_S = 60.0
_OF_CALLER = "{} of this caller wait already"


@dataclass(frozen=True)
class Bounds:
    """How many jobs may be queued, in all and of one owner; of batches, how many lines, and how many one may have."""

    waiting: int = 10_000
    per_owner: int = 10_000
    lines: int = 50_000
    lines_per_owner: int = 50_000
    lines_at_once: int = 5_000


async def submit(connection: AsyncConnection, new: NewJob, key: Idempotency | None, bounds: Bounds) -> Submission:
    """One after another, so that the bounds are exact and a key used twice at once finds the first one's job."""
    await one_at_a_time(connection, "submit")
    if key is not None and (known := await earlier(connection, new.owner, key)) is not None:
        return known
    await check_room(connection, new.owner, bounds)
    values = await _values(connection, new)
    row = (await connection.execute(insert(jobs).values(values).returning(jobs))).one()
    await record(connection, row, "state", SUBMITTED, row.created_at)
    if key is not None:
        await connection.execute(insert(idempotency).values(owner=new.owner, job_id=row.id, **asdict(key)))
    return Submission(job_of(row))


async def retry(
    connection: AsyncConnection, id: str, owner: str | None, key: Idempotency | None, bounds: Bounds
) -> Submission:
    """The same job anew, with as much time until its deadline as the first had."""
    job = await get(connection, id, owner)
    if job.state not in _AGAIN:
        raise InvalidRequest("id", f"the job is {job.state}; only {', '.join(_AGAIN)} ones can be tried again")
    if job.data_removed:
        raise InvalidRequest("id", "the job's request has been removed; submit it anew")
    new = NewJob(
        owner=job.owner,
        model=job.model,
        kind=job.kind,
        request=job.request,
        priority=job.priority,
        deadline_s=None if job.deadline_at is None else job.deadline_at - job.created_at,
        work=job.work,
        webhook=job.webhook,
        retry_of=job.id,
        inputs=job.inputs,
        at_once=job.at_once,
    )
    return await submit(connection, new, key, bounds)


async def next_turn(connection: AsyncConnection, new: NewJob) -> int:
    """Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) with turns of one job each.

    An owner's jobs take consecutive turns, the first of them the one after the highest that was had; so a newcomer's
    first job stands beside the first of somebody who has thousands waiting, and behind what is handed back.
    """
    highest = select(jobs.c.turn).where(jobs.c.model == new.model, jobs.c.priority == new.priority)
    highest = highest.order_by(jobs.c.turn.desc()).limit(1)
    had = await connection.scalar(highest.where(SERVED))
    mine = await connection.scalar(highest.where(QUEUED, jobs.c.owner == new.owner))
    return 1 + max(-1 if had is None else had, -1 if mine is None else mine)


async def earlier(connection: AsyncConnection, owner: str, key: Idempotency) -> Submission | None:
    """The job that the key made before. Raises InvalidRequest where it was for another body."""
    query = select(idempotency.c.fingerprint, idempotency.c.job_id).where(
        idempotency.c.owner == owner, idempotency.c.route == key.route, idempotency.c.key == key.key
    )
    known = (await connection.execute(query)).one_or_none()
    if known is None:
        return None
    if known.fingerprint != key.fingerprint:
        raise InvalidRequest("Idempotency-Key", "was used for another body; take a new key for a new request")
    return Submission(await get(connection, known.job_id, None), replayed=True)


async def check_room(connection: AsyncConnection, owner: str, bounds: Bounds) -> None:
    """Raises Overloaded where as many jobs wait as may."""
    await _check_bound(connection, ALONE, bounds.waiting, "jobs wait already")
    await _check_bound(connection, and_(ALONE, jobs.c.owner == owner), bounds.per_owner, _OF_CALLER.format("jobs"))


async def check_room_for_lines(connection: AsyncConnection, owner: str, lines: int, bounds: Bounds) -> None:
    """Raises Overloaded where so many lines more would be more than may wait."""
    of_owner = and_(LINE, jobs.c.owner == owner)
    await _check_bound(connection, LINE, bounds.lines, "lines of batches wait already", lines)
    await _check_bound(connection, of_owner, bounds.lines_per_owner, _OF_CALLER.format("lines of batches"), lines)


async def _check_bound(
    connection: AsyncConnection, whose: ColumnElement[bool], bound: int, what: str, more: int = 1
) -> None:
    """Counts no further than the bound. A place becomes free when one job is done: about then to come back."""
    waiting = select(jobs.c.work).where(QUEUED, whose).limit(bound).subquery()
    count, work = (await connection.execute(select(func.count(), func.sum(waiting.c.work)))).one()
    if count + more > bound:
        raise Overloaded(min(max((work or 0.0) / max(count, 1), 1.0), _LONGEST_WAIT_S), f"{count} {what}")


async def _values(connection: AsyncConnection, new: NewJob) -> Mapping[str, Any]:
    now = await clock(connection)
    return row_of(new, new_id(now, await newest(connection)), await next_turn(connection, new), now)


async def newest(connection: AsyncConnection) -> str | None:
    """The highest id: later ones are made higher, so they have the order of submissions, whatever the clock does."""
    return await connection.scalar(select(jobs.c.id).order_by(jobs.c.id.desc()).limit(1))


def row_of(new: NewJob, id: str, turn: int, now: float) -> dict[str, Any]:
    """The row of a job that is submitted now."""
    deadline_at = None if new.deadline_s is None else now + new.deadline_s
    return {
        "id": id,
        "owner": new.owner,
        "state": State.QUEUED,
        "model": new.model,
        "kind": new.kind,
        "request": dict(new.request),
        "inputs": new.inputs,
        "at_once": new.at_once,
        "priority": new.priority,
        "turn": turn,
        "start_by": math.inf if deadline_at is None else deadline_at - new.work,
        "deadline_at": deadline_at,
        "work": new.work,
        "created_at": now,
        "attempt": 0,
        "deaths": 0,
        "failures": 0,
        "outputs": [],
        "webhook": None if new.webhook is None else asdict(new.webhook),
        "retry_of": new.retry_of,
        "data_removed": False,
        "seq": 1,
        "told_at": 0.0,
    }
