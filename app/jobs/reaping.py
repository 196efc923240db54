"""What nobody else can tell of: runners that are gone, deadlines that passed, jobs nobody asks about any more."""

import time

from sqlalchemy import ColumnElement, and_, delete, not_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import clock
from app.jobs import batches, endpoints
from app.jobs.attempts import bury
from app.jobs.claiming import expire_overdue
from app.jobs.job import Reaped
from app.jobs.journal import Journal, Payload
from app.jobs.states import State
from app.jobs.tables import FINISHED, LEASED, SETTLED, deliveries, events, jobs

_CLOCK_NOISE_S = 1.0


async def reap(connection: AsyncConnection, limit: int, since: float | None, payload: Payload) -> Reaped:
    """Skips what somebody else is changing: the next round finds it."""
    journal = await Journal.open(connection, payload)
    # Only now that the clock has answered: this call itself may have waited for a database that was frozen.
    gap_s = 0.0 if since is None else time.monotonic() - since
    # A gap shorter than half a lease has cost nobody theirs.
    meanwhile = and_(jobs.c.lease_until >= journal.now - gap_s, jobs.c.lease_s < 2.0 * gap_s)
    expired = and_(LEASED, jobs.c.lease_until < journal.now)
    begun_anew = await _shorten(journal) + await _begin_anew(journal, and_(expired, meanwhile))
    ended = await expire_overdue(journal, limit) + await _stop_overdue(journal, limit)
    lost = select(jobs).where(expired, not_(meanwhile)).order_by(jobs.c.lease_until).limit(limit)
    rows = (await connection.execute(lost.with_for_update(skip_locked=True))).all()
    buried = [await bury(journal, row, "lease_lost", None) for row in rows]
    return Reaped(
        queued=tuple(job.id for job in buried if job.state is State.QUEUED),
        ended=(*ended, *(job.id for job in buried if job.finished)),
        begun_anew=begun_anew,
    )


async def prune(connection: AsyncConnection, keep_s: float, forget_s: float, limit: int) -> int:
    """First the oldest jobs' data, then the oldest jobs, deliveries, and addresses that were disabled."""
    now = await clock(connection)
    old = select(jobs.c.id).where(FINISHED).order_by(jobs.c.finished_at).limit(limit)
    full = old.where(jobs.c.data_removed.is_(False), jobs.c.finished_at < now - keep_s)
    empty = old.where(jobs.c.data_removed.is_(True), jobs.c.finished_at < now - forget_s)
    stripped = list(await connection.scalars(full.with_for_update(skip_locked=True)))
    await connection.execute(delete(events).where(events.c.job_id.in_(stripped)))
    nothing = {"request": {}, "outputs": [], "result": None, "progress": None, "data_removed": True}
    await connection.execute(update(jobs).where(jobs.c.id.in_(stripped)).values(nothing))
    forgotten = list(await connection.scalars(empty.with_for_update(skip_locked=True)))
    await connection.execute(delete(jobs).where(jobs.c.id.in_(forgotten)))
    settled = select(deliveries.c.id).where(SETTLED, deliveries.c.finished_at < now - forget_s).limit(limit)
    sent = await connection.execute(delete(deliveries).where(deliveries.c.id.in_(settled)))
    await endpoints.forget(connection, now - forget_s)
    await batches.forget(connection, now - forget_s, limit)
    return max(len(stripped), len(forgotten), sent.rowcount)


async def _shorten(journal: Journal) -> int:
    """A lease that ends later than it can was given before the clock was set back: it begins anew, now."""
    beyond = jobs.c.lease_until > journal.now + jobs.c.lease_s + _CLOCK_NOISE_S
    statement = update(jobs).where(LEASED, beyond).values(lease_until=journal.now + jobs.c.lease_s)
    return (await journal.connection.execute(statement)).rowcount


async def _begin_anew(journal: Journal, which: ColumnElement[bool]) -> int:
    """Leases that ran out while the database did not answer, so that nobody could renew them. Says of how many jobs.

    In the order of ids, and without those that another changes: heartbeats may come at this very moment.
    """
    query = select(jobs.c.id).where(which).order_by(jobs.c.id).with_for_update(skip_locked=True)
    ids = (await journal.connection.scalars(query)).all()
    renewed = update(jobs).where(jobs.c.id.in_(ids)).values(lease_until=journal.now + jobs.c.lease_s)
    if ids:
        await journal.connection.execute(renewed)
    return len(ids)


async def _stop_overdue(journal: Journal, limit: int) -> list[str]:
    """Running jobs whose time is over; their runners learn at the next heartbeat that the job is lost."""
    running = and_(LEASED, jobs.c.state == State.RUNNING, jobs.c.deadline_at < journal.now)
    query = select(jobs).where(running).order_by(jobs.c.lease_until).limit(limit).with_for_update(skip_locked=True)
    rows = (await journal.connection.execute(query)).all()
    return [(await journal.move(row, State.EXPIRED, "deadline")).id for row in rows]
