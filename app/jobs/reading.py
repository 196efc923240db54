"""What callers ask about jobs. Every query goes by an index; none costs more where more jobs wait."""

import base64
import binascii
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Select, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from app.jobs.job import Job, JobEvent, Page, Position
from app.jobs.journal import job_of
from app.jobs.states import State
from app.jobs.tables import FINISHED, QUEUED, events, jobs
from models.errors import InvalidRequest, NotFound

PAGE_LIMIT = 200
EVENTS_LIMIT = 1000
POSITION_LIMIT = 1000  # jobs before one that are counted at most
LOOKED_THROUGH = 200  # finished jobs, for those of one model

_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which jobs: of this owner (None: everybody's), in these states (none: any), of this model and kind."""

    owner: str | None = None
    states: frozenset[State] = frozenset()
    model: str | None = None
    kind: str | None = None

    def of(self, query: Select[Any]) -> Select[Any]:
        """The query, narrowed."""
        wanted = {"owner": self.owner, "model": self.model, "kind": self.kind}
        query = query.where(*(jobs.c[name] == value for name, value in wanted.items() if value is not None))
        return query.where(jobs.c.state.in_(sorted(self.states))) if self.states else query


def is_id(text: str) -> bool:
    """Whether a text has the form of ids."""
    return _ID.fullmatch(text) is not None


async def get(connection: AsyncConnection, id: str, owner: str | None) -> Job:
    """One job; somebody else's is NotFound like one that never was."""
    return job_of(await _row(connection, id, owner))


async def page(connection: AsyncConnection, wanted: Filter, cursor: str | None, limit: int) -> Page:
    """A page by keyset: one more row than asked for tells whether there is another page."""
    if not 1 <= limit <= PAGE_LIMIT:
        raise InvalidRequest("limit", f"must be from 1 to {PAGE_LIMIT}")
    query = wanted.of(select(jobs).order_by(jobs.c.id.desc()).limit(limit + 1))
    if cursor is not None:
        query = query.where(jobs.c.id < _opened(cursor))
    rows = (await connection.execute(query)).all()
    more = len(rows) > limit
    return Page(tuple(job_of(row) for row in rows[:limit]), _sealed(rows[limit - 1].id) if more else None)


async def position(connection: AsyncConnection, id: str, owner: str | None) -> Position:
    """Those of a higher priority, and those of the same with an earlier place; both counted up to the limit."""
    row = await _row(connection, id, owner)
    if row.state != State.QUEUED:
        return Position(0, 0.0)
    queue = select(jobs.c.work).where(QUEUED, jobs.c.model == row.model).limit(POSITION_LIMIT + 1)
    place = tuple_(jobs.c.turn, jobs.c.start_by, jobs.c.id) < tuple_(row.turn, row.start_by, row.id)
    ahead, work = 0, 0.0
    for part in (queue.where(jobs.c.priority > row.priority), queue.where(jobs.c.priority == row.priority, place)):
        waiting = part.subquery()
        count, seconds = (await connection.execute(select(func.count(), func.sum(waiting.c.work)))).one()
        ahead, work = ahead + count, work + (seconds or 0.0)
    return Position(min(ahead, POSITION_LIMIT), work, ahead <= POSITION_LIMIT)


async def events_of(
    connection: AsyncConnection, id: str, owner: str | None, after_seq: int, limit: int
) -> tuple[JobEvent, ...]:
    """The events after one; by the primary key."""
    if not 1 <= limit <= EVENTS_LIMIT:
        raise InvalidRequest("limit", f"must be from 1 to {EVENTS_LIMIT}")
    await get(connection, id, owner)
    query = select(events).where(events.c.job_id == id, events.c.seq > after_seq).order_by(events.c.seq).limit(limit)
    return tuple(JobEvent(**row._mapping) for row in await connection.execute(query))


async def measured(connection: AsyncConnection, model: str, limit: int) -> tuple[Job, ...]:
    """The newest first. Backwards through the index of finished jobs, LOOKED_THROUGH of them at most."""
    recent = select(jobs.c.id).where(FINISHED, jobs.c.data_removed.is_(False))
    recent = recent.order_by(jobs.c.finished_at.desc()).limit(LOOKED_THROUGH)
    fitting = (jobs.c.model == model, jobs.c.state == State.SUCCEEDED, jobs.c.attempt == 1)
    query = select(jobs).where(jobs.c.id.in_(recent), *fitting).order_by(jobs.c.finished_at.desc()).limit(limit)
    return tuple(job_of(row) for row in await connection.execute(query))


async def known(connection: AsyncConnection, keys: Collection[str]) -> frozenset[str]:
    """By the names of their folders: `inputs/<folder>/...`, `results/<job>/...`."""
    folders = {parts[1]: parts[0] for key in keys if len(parts := key.split("/")) == 3}
    inputs = [name for name, kind in folders.items() if kind == "inputs"]
    owned = select(jobs.c.inputs).where(jobs.c.inputs.in_(inputs), jobs.c.data_removed.is_(False))
    found = {f"inputs/{folder}" for folder in await connection.scalars(owned)}
    results = [name for name, kind in folders.items() if kind == "results"]
    made = select(jobs.c.outputs).where(jobs.c.id.in_(results))
    outputs = {output["key"] for of_one in await connection.scalars(made) for output in of_one}
    return frozenset(key for key in keys if key in outputs or key.rpartition("/")[0] in found)


async def _row(connection: AsyncConnection, id: str, owner: str | None) -> Row[Any]:
    query = Filter(owner=owner).of(select(jobs).where(jobs.c.id == id))
    row = (await connection.execute(query)).one_or_none() if is_id(id) else None
    if row is None:
        raise NotFound(f"there is no job {id[:64]!r}")
    return row


def _sealed(id: str) -> str:
    return base64.urlsafe_b64encode(bytes.fromhex(id)).decode().rstrip("=")


def _opened(cursor: str) -> str:
    try:
        id = base64.urlsafe_b64decode(cursor + "==").hex()
    except (binascii.Error, ValueError):
        id = ""
    if not is_id(id):
        raise InvalidRequest("cursor", "must be the `next` of an earlier page")
    return id
