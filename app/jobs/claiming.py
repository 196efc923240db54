"""Which job is next, and how a runner gets it.

The queue of a model is in order of priority, then of turns. The lowest turn says whose turn it is; that owner's most
urgent job takes it, and gives its own turn to the job that had it. So both the fairness among owners and the order
within one come out of indexes, and a claim reads as many rows among ten thousand as among ten.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, exists, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import one_at_a_time
from app.jobs.job import Claim
from app.jobs.journal import Journal, Payload
from app.jobs.states import State
from app.jobs.tables import BEREFT, LEASED, QUEUED, jobs

EXPIRED_AT_ONCE = 100  # overdue jobs that one claim gets rid of at most
SUSPECT_DEATHS = 2  # the first may be chance, and all that shared the worker go on together


@dataclass(frozen=True)
class _Candidate:
    """The job that a model should run next, and the one of the same owner that had the turn (mostly itself)."""

    row: Row[Any]
    head: Row[Any]

    @property
    def rank(self) -> tuple[int, str]:
        """Among candidates of several models the smallest goes first: by priority, then by age."""
        return -self.row.priority, self.row.id


async def claim(
    connection: AsyncConnection, runner: str, models: Sequence[str], limit: int, lease_s: float, payload: Payload
) -> tuple[Claim, ...]:
    """Takes the best candidate of all models until there are `limit` or none."""
    journal = await Journal.open(connection, payload)
    room = EXPIRED_AT_ONCE - len(await expire_overdue(journal, EXPIRED_AT_ONCE))
    candidates: dict[str, _Candidate] = {}
    unknown, claims = set(models), list[Claim]()
    while len(claims) < limit and room >= 0:
        candidates |= {model: found for model in unknown if (found := await _candidate(journal, model))}
        if not candidates:
            break
        row = min(candidates.values(), key=lambda candidate: candidate.rank).row
        if row.start_by < journal.now:
            await journal.move(row, State.EXPIRED, "deadline")
            room -= 1
        else:
            claims.append(await _take(journal, candidates[row.model], runner, lease_s))
        unknown = {model for model, found in candidates.items() if model == row.model or found.row.owner == row.owner}
        candidates = {model: found for model, found in candidates.items() if model not in unknown}
    return tuple(claims)


async def expire_overdue(journal: Journal, limit: int) -> list[str]:
    """Ends queued jobs that could not be finished in time any more; gives their ids."""
    query = select(jobs).where(QUEUED, jobs.c.start_by < journal.now).order_by(jobs.c.start_by).limit(limit)
    rows = (await journal.connection.execute(query.with_for_update(skip_locked=True))).all()
    return [(await journal.move(row, State.EXPIRED, "deadline")).id for row in rows]


async def _candidate(journal: Journal, model: str) -> _Candidate | None:
    """The next job of a model; a suspect only while no other one runs, and of nobody more than may run at once."""
    queue = and_(QUEUED, jobs.c.model == model)
    while (found := await _next(journal, queue)) is not None:
        if found.row.deaths >= SUSPECT_DEATHS and await _suspect_runs(journal, model):
            queue = and_(queue, jobs.c.deaths < SUSPECT_DEATHS)
        elif found.row.at_once is not None and await _runs_enough(journal, found.row):
            queue = and_(queue, jobs.c.owner != found.row.owner)
        else:
            break
    return found


async def _next(journal: Journal, queue: ColumnElement[bool]) -> _Candidate | None:
    """Two steps along two indexes: whose turn it is, and what that owner wants most. Skips what another claims."""
    by_turn = select(jobs).where(queue).order_by(jobs.c.priority.desc(), jobs.c.turn, jobs.c.start_by, jobs.c.id)
    head = (await journal.connection.execute(by_turn.limit(1).with_for_update(skip_locked=True))).one_or_none()
    if head is None:
        return None
    lane = select(jobs).where(queue, jobs.c.priority == head.priority, jobs.c.owner == head.owner)
    by_urgency = lane.order_by(jobs.c.start_by, jobs.c.id).limit(1).with_for_update(skip_locked=True)
    return _Candidate((await journal.connection.execute(by_urgency)).one(), head)


async def _suspect_runs(journal: Journal, model: str) -> bool:
    """Whether a suspect of this model runs now. Until the transaction ends nobody else can start one."""
    await one_at_a_time(journal.connection, "suspects")
    query = select(exists().where(BEREFT, LEASED, jobs.c.model == model, jobs.c.deaths >= SUSPECT_DEATHS))
    return bool(await journal.connection.scalar(query))


async def _runs_enough(journal: Journal, row: Row[Any]) -> bool:
    """Whether as many of the owner's jobs run as may at once. Until the transaction ends nobody else can start one."""
    await one_at_a_time(journal.connection, f"jobs of {row.owner}")
    running = select(func.count()).where(LEASED, jobs.c.owner == row.owner)
    return (await journal.connection.scalar(running) or 0) >= row.at_once


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
        runner=runner,
        lease_s=lease_s,
        lease_until=journal.now + lease_s,
        started_at=journal.now if row.started_at is None else row.started_at,
        progress=None,
        outputs=[],
    )
    return Claim(job)
