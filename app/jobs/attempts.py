"""How an attempt at a job goes on and ends. Each write is fenced by the attempt's number."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row, and_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.jobs import poison
from app.jobs.job import Claim, Heartbeat, Job, JobError, JobProgress, Stale
from app.jobs.journal import Journal, Payload, job_of
from app.jobs.reading import get
from app.jobs.states import HELD, State
from app.jobs.tables import LEASED, jobs

MAX_FAILURES = 3  # attempts that may end with an error


async def cancel(connection: AsyncConnection, id: str, owner: str | None, payload: Payload) -> Job:
    """Said again, or to a finished job, it changes nothing."""
    job = await get(connection, id, owner)
    journal = await Journal.open(connection, payload)
    row = await journal.lock(id)
    if row is None or row.state not in (State.QUEUED, State.RUNNING):
        return job if row is None else job_of(row)
    return await journal.move(row, State.CANCELLED if row.state == State.QUEUED else State.CANCELLING, "cancelled")


async def heartbeat(
    connection: AsyncConnection,
    claims: Sequence[Claim],
    lease_s: float,
    progress: Mapping[str, JobProgress],
    payload: Payload,
) -> Heartbeat:
    """Locks in the order of ids, as everybody does who locks several jobs: so nobody waits in a circle."""
    journal = await Journal.open(connection, payload)
    attempts = {claim.id: claim.attempt for claim in claims}
    query = select(jobs).where(jobs.c.id.in_(attempts)).order_by(jobs.c.id).with_for_update()
    rows = [row for row in await connection.execute(query) if _holds(row, attempts[row.id])]
    held = [row.id for row in rows]
    lease = {"lease_s": lease_s, "lease_until": journal.now + lease_s}
    await connection.execute(update(jobs).where(jobs.c.id.in_(held)).values(lease))
    for row in rows:
        if row.id in progress and asdict(progress[row.id]) != row.progress:
            await journal.progress(row, progress[row.id])
    return Heartbeat(
        lost=frozenset(attempts) - frozenset(held),
        cancel=frozenset(row.id for row in rows if row.state == State.CANCELLING),
    )


async def output(connection: AsyncConnection, claim: Claim, output: Any, payload: Payload) -> Job:
    """One picture more, unless it was told before and the answer was lost on the way."""
    journal = await Journal.open(connection, payload)
    row = await _held(journal, claim)
    return job_of(row) if output in row.outputs else await journal.output(row, output)


async def succeed(connection: AsyncConnection, claim: Claim, result: Mapping[str, Any], payload: Payload) -> Job:
    """Also while cancelling: what is finished is given."""
    journal = await Journal.open(connection, payload)
    if (done := await _already(journal, claim, State.SUCCEEDED)) is not None:
        return done
    return await journal.move(await _held(journal, claim), State.SUCCEEDED, "finished", result=dict(result))


async def fail(connection: AsyncConnection, claim: Claim, error: JobError, retry: bool, payload: Payload) -> Job:
    """An error that another attempt may mend counts as a failure; the last one of them is final."""
    journal = await Journal.open(connection, payload)
    if (done := await _already(journal, claim, State.QUEUED if retry else State.FAILED)) is not None:
        return done
    row = await _held(journal, claim)
    failures = row.failures + 1
    if retry and failures < MAX_FAILURES:
        return await _back(journal, row, "error", error, failures=failures)
    return await journal.move(row, State.FAILED, "error", error, failures=failures)


async def died(connection: AsyncConnection, claim: Claim, error: JobError, payload: Payload) -> Job:
    """The runner lives and saw its worker die."""
    journal = await Journal.open(connection, payload)
    if (done := await _already(journal, claim, State.QUEUED)) is not None:
        return done
    return await bury(journal, await _held(journal, claim), "worker_died", error)


async def release(connection: AsyncConnection, claim: Claim, payload: Payload) -> Job:
    """No fault of the job's: neither a failure nor a death."""
    journal = await Journal.open(connection, payload)
    if (done := await _already(journal, claim, State.QUEUED)) is not None:
        return done
    return await _back(journal, await _held(journal, claim), "released", None)


async def hand_back(connection: AsyncConnection, runner: str, but: Collection[str], payload: Payload) -> list[Job]:
    """What a runner holds without knowing."""
    journal = await Journal.open(connection, payload)
    held = and_(LEASED, jobs.c.runner == runner)
    others = select(jobs.c.id).where(held, jobs.c.id.not_in(but))
    query = select(jobs).where(held, jobs.c.id.in_(others)).order_by(jobs.c.id).with_for_update()
    rows = (await connection.execute(query)).all()
    return [await _back(journal, row, "released", None) for row in rows]


async def expire(connection: AsyncConnection, claim: Claim, payload: Payload) -> Job:
    """What should stop anyway has thereby stopped."""
    journal = await Journal.open(connection, payload)
    if (done := await _already(journal, claim, State.EXPIRED)) is not None:
        return done
    row = await _held(journal, claim)
    if row.state == State.CANCELLING:
        return await journal.move(row, State.CANCELLED, "cancelled")
    return await journal.move(row, State.EXPIRED, "deadline")


async def cancelled(connection: AsyncConnection, claim: Claim, payload: Payload) -> Job:
    """After this no result can come: the attempt's number is void."""
    journal = await Journal.open(connection, payload)
    if (done := await _already(journal, claim, State.CANCELLED)) is not None:
        return done
    return await journal.move(await _held(journal, claim), State.CANCELLED, "cancelled")


async def bury(journal: Journal, row: Row[Any], reason: str, error: JobError | None) -> Job:
    """A worker died with this job."""
    deaths = row.deaths + 1
    if row.state == State.CANCELLING or not poison.is_poisoned(row):
        return await _back(journal, row, reason, error, deaths=deaths)
    poisoned = JobError(code="poisoned", message=f"{deaths} workers died while they ran this job")
    return await journal.move(row, State.FAILED, "poisoned", poisoned, deaths=deaths)


async def _back(journal: Journal, row: Row[Any], reason: str, error: JobError | None, **changes: Any) -> Job:
    """To the queue, with the turn it had; what should stop anyway has thereby stopped."""
    if row.state == State.CANCELLING:
        return await journal.move(row, State.CANCELLED, "cancelled", **changes)
    return await journal.move(row, State.QUEUED, reason, error, **changes)


async def _held(journal: Journal, claim: Claim) -> Row[Any]:
    row = await journal.lock(claim.id)
    if row is None or not _holds(row, claim.attempt):
        raise Stale()
    return row


def _holds(row: Row[Any], attempt: int) -> bool:
    return row.attempt == attempt and row.state in HELD


async def _already(journal: Journal, claim: Claim, state: State) -> Job | None:
    """The job, where this attempt has brought it to this state before and the answer was lost on the way."""
    row = await journal.lock(claim.id)
    return job_of(row) if row is not None and row.attempt == claim.attempt and row.state == state else None
