"""Which job is next, and how a runner gets it.

The queue of a model is in order of priority, then of turns. The lowest turn says whose turn it is; that owner's most
urgent job takes it, and gives its own turn to the job that had it. So both the fairness among owners and the order
within one come out of indexes, and a claim reads as many rows among ten thousand as among ten. Where the owner whose
turn it is has as many jobs running as may, the others' turns are looked up, by one probe for each owner who waits.
"""

from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, exists, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import one_at_a_time
from app.jobs import poison
from app.jobs.job import Claim
from app.jobs.journal import Journal, Payload
from app.jobs.states import State
from app.jobs.tables import LEASED, QUEUED, jobs

EXPIRED_AT_ONCE = 100  # overdue jobs that one claim gets rid of at most


@dataclass(frozen=True)
class _Candidate:
    """The job that a model should run next, and the one of the same owner that had the turn (mostly itself)."""

    row: Row[Any]
    head: Row[Any]

    @property
    def rank(self) -> tuple[int, str]:
        """Among candidates of several models the smallest goes first: by priority, then by age."""
        return -self.row.priority, self.row.id


@dataclass
class _Running:
    """How many jobs run, of each model and each owner, and the models of which a suspect runs."""

    of_model: Counter[str] = field(default_factory=Counter)
    of_owner: Counter[str] = field(default_factory=Counter)
    suspected: set[str] = field(default_factory=set)

    def add(self, owner: str, model: str, deaths: int) -> None:
        self.of_model[model] += 1
        self.of_owner[owner] += 1
        if poison.is_suspect(deaths):
            self.suspected.add(model)

    def is_full(self, owner: str, at_once: int | None) -> bool:
        """Whether as many of the owner's jobs run as may."""
        return at_once is not None and self.of_owner[owner] >= at_once

    def lets_in(self, row: Row[Any]) -> bool:
        """Whether the job may run beside those of its model."""
        return row.model not in self.suspected and not (poison.is_suspect(row.deaths) and self.of_model[row.model])


async def claim(
    connection: AsyncConnection, runner: str, models: Sequence[str], limit: int, lease_s: float, payload: Payload
) -> tuple[Claim, ...]:
    """Takes the best candidate of all models until there are `limit` or none.

    One claimer after another, from where there is something to claim: what may run depends on what runs.
    """
    journal = await Journal.open(connection, payload)
    room = EXPIRED_AT_ONCE - len(await expire_overdue(journal, EXPIRED_AT_ONCE))
    if not await connection.scalar(select(exists().where(QUEUED, jobs.c.model.in_(models)))):
        return ()
    await one_at_a_time(connection, "claims")
    running = await _running(connection)
    # Leases begin now, after others' claims; and what has ended, so that this may run, ended before by the same clock.
    journal = await Journal.open(connection, payload)
    candidates: dict[str, _Candidate] = {}
    unknown, claims = set(models), list[Claim]()
    while len(claims) < limit and room >= 0:
        candidates |= {model: found for model in unknown if (found := await _candidate(journal, model, running))}
        if not candidates:
            break
        row = min(candidates.values(), key=lambda candidate: candidate.rank).row
        if row.start_by < journal.now:
            await journal.move(row, State.EXPIRED, "deadline")
            room -= 1
        else:
            claims.append(await _take(journal, candidates[row.model], runner, lease_s))
            running.add(row.owner, row.model, row.deaths)
        unknown = {model for model, found in candidates.items() if model == row.model or found.row.owner == row.owner}
        candidates = {model: found for model, found in candidates.items() if model not in unknown}
    crowded = {held.job.model for held in claims if running.of_model[held.job.model] > 1}
    if crowded:
        await poison.note_company(connection, crowded)
    return tuple(claims)


async def expire_overdue(journal: Journal, limit: int) -> list[str]:
    """Ends queued jobs that could not be finished in time any more; gives their ids."""
    query = select(jobs).where(QUEUED, jobs.c.start_by < journal.now).order_by(jobs.c.start_by).limit(limit)
    rows = (await journal.connection.execute(query.with_for_update(skip_locked=True))).all()
    return [(await journal.move(row, State.EXPIRED, "deadline")).id for row in rows]


async def _running(connection: AsyncConnection) -> _Running:
    """Counted here: to group them SQLite would read all jobs in the order of another index."""
    running = _Running()
    for row in await connection.execute(select(jobs.c.owner, jobs.c.model, jobs.c.deaths).where(LEASED)):
        running.add(row.owner, row.model, row.deaths)
    return running


async def _candidate(journal: Journal, model: str, running: _Running) -> _Candidate | None:
    """The next job of a model, of nobody of whom enough run; none where it has to wait for what runs of the model."""
    by_turn = (jobs.c.priority.desc(), jobs.c.turn, jobs.c.start_by, jobs.c.id)
    found = await _next(journal, and_(QUEUED, jobs.c.model == model), *by_turn)
    if found is not None and running.is_full(found.row.owner, found.row.at_once):
        found = await _of_others(journal, model, running)
    return found if found is not None and running.lets_in(found.row) else None


async def _next(journal: Journal, queue: ColumnElement[bool], *order: ColumnElement[Any]) -> _Candidate | None:
    """Two steps along two indexes: whose turn it is, and what that owner wants most. Skips what another changes."""
    by_turn = select(jobs).where(queue).order_by(*order).limit(1).with_for_update(skip_locked=True)
    head = (await journal.connection.execute(by_turn)).one_or_none()
    if head is None:
        return None
    lane = select(jobs).where(queue, jobs.c.priority == head.priority, jobs.c.owner == head.owner)
    by_urgency = lane.order_by(jobs.c.start_by, jobs.c.id).limit(1).with_for_update(skip_locked=True)
    return _Candidate((await journal.connection.execute(by_urgency)).one(), head)


async def _of_others(journal: Journal, model: str, running: _Running) -> _Candidate | None:
    """The next job of an owner of whom one more may run."""
    async with aclosing(_priorities(journal.connection, model)) as priorities:
        async for priority in priorities:
            lane = and_(QUEUED, jobs.c.model == model, jobs.c.priority == priority)
            for head in (await journal.connection.execute(_heads(lane))).all():
                if running.is_full(head.owner, head.at_once):
                    continue
                found = await _next(journal, and_(lane, jobs.c.owner == head.owner), jobs.c.turn)
                if found is not None and not running.is_full(found.row.owner, found.row.at_once):
                    return found
    return None


async def _priorities(connection: AsyncConnection, model: str) -> AsyncGenerator[int, None]:
    """Those that jobs of a model wait with, the highest first."""
    query = select(jobs.c.priority).where(QUEUED, jobs.c.model == model).order_by(jobs.c.priority.desc()).limit(1)
    priority = await connection.scalar(query)
    while priority is not None:
        yield priority
        priority = await connection.scalar(query.where(jobs.c.priority < priority))


def _heads(lane: ColumnElement[bool]) -> Select[Any, Any, Any]:
    """Each owner in a lane, with `at_once` of the first job, in order of turns; the others' rows are not read.

    PostgreSQL's wiki calls the recursion a loose index scan: from each owner on to the next.
    """
    owners = select(jobs.c.owner).where(lane).order_by(jobs.c.owner).limit(1)
    known = select(owners.scalar_subquery().label("owner")).cte("owners", recursive=True)
    after = owners.where(jobs.c.owner > known.c.owner).scalar_subquery()
    known = known.union_all(select(after).where(known.c.owner.is_not(None)))
    of_owner = select(jobs.c.turn).where(lane, jobs.c.owner == known.c.owner).order_by(jobs.c.turn).limit(1)
    turn = of_owner.scalar_subquery().label("turn")
    at_once = of_owner.with_only_columns(jobs.c.at_once).scalar_subquery().label("at_once")
    return select(known.c.owner, at_once, turn).where(known.c.owner.is_not(None)).order_by(turn, known.c.owner)


async def _take(journal: Journal, candidate: _Candidate, runner: str, lease_s: float) -> Claim:
    row, head = candidate.row, candidate.head
    if row.id != head.id:
        await journal.connection.execute(update(jobs).where(jobs.c.id == head.id).values(turn=row.turn))
    job = await journal.move(
        row,
        State.RUNNING,
        "claimed",
        turn=head.turn,
        attempt=row.attempt + 1,
        accompanied=False,
        runner=runner,
        lease_s=lease_s,
        lease_until=journal.now + lease_s,
        started_at=journal.now if row.started_at is None else row.started_at,
        progress=None,
        outputs=[],
    )
    return Claim(job)
