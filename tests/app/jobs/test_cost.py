"""What does not grow with the queue: the rows that PostgreSQL visits, the instructions that SQLite runs."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database
from app.jobs import attempts, claiming, reading, reaping, submission
from app.jobs.job import Claim, JobProgress
from app.jobs.journal import thin_payload
from bench.jobs import fill
from tests.app.jobs.making import LEASE_S, new

Work = Callable[[AsyncConnection, Claim], Awaitable[Any]]

WORKS: dict[str, Work] = {
    "get": lambda c, held: reading.get(c, held.id, None),
    "events": lambda c, held: reading.events_of(c, held.id, None, 0, 100),
    "list": lambda c, held: reading.page(c, reading.Filter(owner="owner-1"), None, 20),
    "claim": lambda c, _: claiming.claim(c, "runner", ["sd15", "sdxl"], 4, LEASE_S, thin_payload),
    "heartbeat": lambda c, held: attempts.heartbeat(
        c, [held], LEASE_S, {held.id: JobProgress(done=1, total=2)}, thin_payload
    ),
    "succeed": lambda c, held: attempts.succeed(c, held, {}, thin_payload),
    "release": lambda c, held: attempts.release(c, held, thin_payload),
    "hand back": lambda c, _: attempts.hand_back(c, "runner", [], thin_payload),
    "reap": lambda c, _: reaping.reap(c, 100, None, thin_payload),
    "turn": lambda c, _: submission.next_turn(c, new("owner-1")),
}


async def rows_visited(connection: AsyncConnection) -> int:
    """Rows that this transaction has read from all tables by now, by whatever way."""
    query = "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) FROM pg_stat_xact_user_tables"
    return int(await connection.scalar(text(query)) or 0)


async def postgresql_costs(database: Database) -> dict[str, int]:
    """Rows visited by each work; the plans are those for the statistics of the moment."""
    await database.write(lambda c: c.execute(text("ANALYZE jobs")))
    (held,) = await database.write(lambda c: claiming.claim(c, "runner", ["sd15"], 1, LEASE_S, thin_payload))

    async def cost(connection: AsyncConnection, work: Work) -> int:
        before = await rows_visited(connection)
        await work(connection, held)
        visited = await rows_visited(connection) - before
        await connection.rollback()
        await connection.begin()
        return visited

    return {name: await database.write(lambda c, work=work: cost(c, work)) for name, work in WORKS.items()}


async def sqlite_costs(database: Database) -> dict[str, int]:
    """Instructions of SQLite's virtual machine for each work."""
    (held,) = await database.write(lambda c: claiming.claim(c, "runner", ["sd15"], 1, LEASE_S, thin_payload))

    async def cost(connection: AsyncConnection, work: Work) -> int:
        instructions = 0

        def count() -> int:
            nonlocal instructions
            instructions += 1
            return 0

        raw = await connection.get_raw_connection()
        await raw.driver_connection.set_progress_handler(count, 1)
        await work(connection, held)
        await raw.driver_connection.set_progress_handler(None, 1)
        await connection.rollback()
        await connection.begin()
        return instructions

    return {name: await database.write(lambda c, work=work: cost(c, work)) for name, work in WORKS.items()}


@pytest.mark.parametrize("capped", [0.0, 0.5], ids=["", "half of it of one who is full"])
async def test_no_cost_grows_with_the_queue(database: Database, capped: float) -> None:
    measure = postgresql_costs if database.dialect == "postgresql" else sqlite_costs
    await fill(database, 300, int(capped * 300))
    few = await measure(database)
    await fill(database, 10_000, int(capped * 10_000))
    many = await measure(database)
    assert all(few.values()), few
    grown = {name: (few[name], many[name]) for name in few if many[name] > 2 * few[name] + 10}
    assert not grown


async def test_a_cost_that_grows_is_seen(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scan(connection: AsyncConnection, held: Claim) -> None:
        await connection.execute(text("SELECT count(*) FROM jobs WHERE work > 0"))

    monkeypatch.setitem(WORKS, "scan", scan)
    measure = postgresql_costs if database.dialect == "postgresql" else sqlite_costs
    await fill(database, 30)
    few = await measure(database)
    await fill(database, 2_000)
    assert (await measure(database))["scan"] > 10 * few["scan"]
