"""Poison: which job is to blame when a worker dies, so that none fails for what its neighbour did.

Convicted is only who was alone. A job is poisoned when a worker died with it that is not the first, and no other job of
its model ran at any time beside the attempt. After a first death all that shared the worker run again, at once and
together. A job with two deaths that was never alone is a suspect: while it runs no other job of its model does, so a
third death is its own. When it is a suspect's turn, nothing of its model is begun before what runs has ended.
"""

from collections.abc import Collection
from typing import Any

from sqlalchemy import Row, and_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.jobs.tables import LEASED, jobs

SUSPECT_DEATHS = 2


def is_suspect(deaths: int) -> bool:
    """Whether a job with so many deaths has to run alone."""
    return deaths >= SUSPECT_DEATHS


def is_poisoned(row: Row[Any]) -> bool:
    """Whether a death now, under this attempt, is the job's own doing."""
    return row.deaths + 1 >= SUSPECT_DEATHS and not row.accompanied


async def note_company(connection: AsyncConnection, models: Collection[str]) -> None:
    """Notes of what runs of these models, each of which runs several jobs now, that it is not alone.

    Only of those with a death, for whom it matters. Locks in the order of ids, as everybody who locks several jobs.
    """
    alone = and_(LEASED, jobs.c.deaths > 0, jobs.c.accompanied.is_(False))
    some = select(jobs.c.id).where(alone, jobs.c.model.in_(models))
    query = select(jobs.c.id).where(alone, jobs.c.id.in_(some)).order_by(jobs.c.id).with_for_update()
    ids = (await connection.scalars(query)).all()
    if ids:
        await connection.execute(update(jobs).where(jobs.c.id.in_(ids)).values(accompanied=True))
