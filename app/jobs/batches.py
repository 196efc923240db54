"""Batches: many jobs that are accepted together, one for each line of a file, and asked about together."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sqlalchemy import Row, delete, exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import clock, one_at_a_time
from app.jobs.job import Idempotency, Job, NewJob
from app.jobs.journal import Journal, Payload, job_of, new_id
from app.jobs.reading import is_id
from app.jobs.states import TERMINAL, State
from app.jobs.submission import (
    SUBMITTED,
    Bounds,
    check_room_for_lines,
    earlier,
    newest,
    next_turn,
    row_of,
)
from app.jobs.tables import FINISHED, LINE, batches, events, idempotency, jobs
from models.errors import InvalidRequest, NotFound

ENDED_AT_ONCE = 200  # lines that one transaction cancels
PAGE_LIMIT = 100
_STOPPABLE = (State.QUEUED, State.RUNNING)


@dataclass(frozen=True, kw_only=True)
class NewLine:
    """A job to be, and what its caller calls it."""

    custom_id: str
    job: NewJob


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch as it stands: how many of its jobs are in each state, when the first began and the last ended."""

    id: str
    owner: str
    total: int
    created_at: float
    cancelling_at: float | None
    counts: Mapping[State, int] = field(default_factory=dict)
    started_at: float | None = None
    finished_at: float | None = None

    @property
    def finished(self) -> bool:
        """Whether every job has ended."""
        return not any(count for state, count in self.counts.items() if state not in TERMINAL)


@dataclass(frozen=True)
class BatchSubmission:
    """What came of a submission; `replayed` where an earlier one with the same idempotency key had made the batch."""

    batch: Batch
    replayed: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a batch, from 1, and its job."""

    number: int
    custom_id: str
    job: Job


async def submit(
    connection: AsyncConnection, owner: str, lines: Sequence[NewLine], key: Idempotency | None, bounds: Bounds
) -> BatchSubmission:
    """All lines or none, one after another with other submissions. The key is kept with the first line's job."""
    await one_at_a_time(connection, "submit")
    if key is not None and (known := await submitted(connection, owner, key)) is not None:
        return known
    await check_room_for_lines(connection, owner, len(lines), bounds)
    now = await clock(connection)
    id = new_id(now)
    rows = await _rows(connection, id, lines, now)
    values = {"id": id, "owner": owner, "total": len(lines), "created_at": now}
    await connection.execute(insert(batches).values(values))
    await connection.execute(insert(jobs), rows)
    first_event = {"seq": 1, "at": now, "kind": "state", "data": SUBMITTED}
    await connection.execute(insert(events), [{"job_id": row["id"]} | first_event for row in rows])
    if key is not None:
        await connection.execute(insert(idempotency).values(owner=owner, job_id=rows[0]["id"], **asdict(key)))
    return BatchSubmission(await get(connection, id, owner))


async def submitted(connection: AsyncConnection, owner: str, key: Idempotency) -> BatchSubmission | None:
    """The batch that the key made before. Raises InvalidRequest where it was for another body."""
    known = await earlier(connection, owner, key)
    if known is None:
        return None
    id = await connection.scalar(select(jobs.c.batch).where(jobs.c.id == known.job.id))
    return BatchSubmission(await get(connection, str(id), owner), replayed=True)


async def get(connection: AsyncConnection, id: str, owner: str | None) -> Batch:
    """One batch; somebody else's is NotFound like one that never was."""
    return (await _counted(connection, [await _row(connection, id, owner)]))[0]


async def page(connection: AsyncConnection, owner: str | None, after: str | None, limit: int) -> list[Batch]:
    """The newest first, from the one after that on, and one more than asked for where there are more."""
    if not 1 <= limit <= PAGE_LIMIT:
        raise InvalidRequest("limit", f"must be from 1 to {PAGE_LIMIT}")
    query = select(batches).order_by(batches.c.id.desc()).limit(limit + 1)
    if owner is not None:
        query = query.where(batches.c.owner == owner)
    if after is not None:
        query = query.where(batches.c.id < (await _row(connection, after, owner)).id)
    return await _counted(connection, (await connection.execute(query)).all())


async def cancel(connection: AsyncConnection, id: str, owner: str | None, payload: Payload) -> bool:
    """Ends some of the lines that wait or run. Gives whether there are more."""
    await _row(connection, id, owner)
    journal = await Journal.open(connection, payload)
    marked = update(batches).where(batches.c.id == id, batches.c.cancelling_at.is_(None))
    open_lines = select(jobs).where(LINE, jobs.c.batch == id, jobs.c.state.in_(_STOPPABLE))
    some = open_lines.order_by(jobs.c.id).limit(ENDED_AT_ONCE).with_for_update()
    rows = (await connection.execute(some)).all()
    if rows:
        await connection.execute(marked.values(cancelling_at=journal.now))
    for row in rows:
        state = State.CANCELLED if row.state == State.QUEUED else State.CANCELLING
        await journal.move(row, state, "cancelled")
    return len(rows) == ENDED_AT_ONCE


async def finished_lines(
    connection: AsyncConnection, id: str, owner: str | None, after: int, limit: int
) -> tuple[Line, ...]:
    """The lines after that one whose jobs have ended, in their order."""
    await _row(connection, id, owner)
    query = select(jobs).where(LINE, jobs.c.batch == id, jobs.c.line > after, FINISHED).order_by(jobs.c.line)
    rows = await connection.execute(query.limit(limit))
    return tuple(Line(number=row.line, custom_id=row.custom_id, job=job_of(row)) for row in rows)


async def forget(connection: AsyncConnection, before: float, limit: int) -> None:
    """Removes batches of which no job is left."""
    left = exists().where(LINE, jobs.c.batch == batches.c.id)
    empty = select(batches.c.id).where(batches.c.created_at < before, ~left).limit(limit)
    await connection.execute(delete(batches).where(batches.c.id.in_(empty)))


async def _rows(connection: AsyncConnection, batch: str, lines: Sequence[NewLine], now: float) -> list[dict[str, Any]]:
    """The jobs' rows: each takes the turn after the one before it among those of its model and priority."""
    turns: dict[tuple[str, int], int] = {}
    rows, id = [], await newest(connection)
    for number, line in enumerate(lines, 1):
        lane = line.job.model, line.job.priority
        turns[lane] = turns[lane] + 1 if lane in turns else await next_turn(connection, line.job)
        id = new_id(now, id)
        row = row_of(line.job, id, turns[lane], now)
        rows.append(row | {"batch": batch, "line": number, "custom_id": line.custom_id})
    return rows


async def _counted(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[Batch]:
    times = func.min(jobs.c.started_at).label("started"), func.max(jobs.c.finished_at).label("finished")
    query = select(jobs.c.batch, jobs.c.state, func.count().label("jobs"), *times)
    ids = [row.id for row in rows]
    grouped = query.where(LINE, jobs.c.batch.in_(ids)).group_by(jobs.c.batch, jobs.c.state)
    found: Sequence[Any] = (await connection.execute(grouped)).all()
    return [_batch(row, [counted for counted in found if counted.batch == row.id]) for row in rows]


def _batch(row: Row[Any], counted: Sequence[Any]) -> Batch:
    counts = {State(one.state): one.jobs for one in counted}
    started = [one.started for one in counted if one.started is not None]
    finished = [one.finished for one in counted if one.finished is not None]
    batch = Batch(**row._mapping, counts=counts, started_at=min(started, default=None))
    return replace(batch, finished_at=max(finished)) if finished and batch.finished else batch


async def _row(connection: AsyncConnection, id: str, owner: str | None) -> Row[Any]:
    query = select(batches).where(batches.c.id == id)
    query = query if owner is None else query.where(batches.c.owner == owner)
    row = (await connection.execute(query)).one_or_none() if is_id(id) else None
    if row is None:
        raise NotFound(f"there is no batch {id[:64]!r}")
    return row
