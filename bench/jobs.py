"""`python -m bench.jobs`: what the job store's methods cost with 10 and with 10,000 jobs waiting."""

import asyncio
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy import delete, insert, select

from app.database import Database
from app.jobs.job import JobProgress, NewJob
from app.jobs.journal import new_id
from app.jobs.store import JobStore
from app.jobs.submission import Bounds
from app.jobs.tables import jobs

T = TypeVar("T")
Seconds = dict[str, list[float]]

SIZES = (10, 10_000)
OWNERS = 10
BATCH = 1000


async def fill(database: Database, count: int, capped: int = 0) -> None:
    """Puts `count` queued jobs of several owners in at once, as so many submissions would have left them.

    The first `capped` of them are another owner's, who has all the first turns, and of whom one job at a time may run.
    """
    store = JobStore(database, Bounds(waiting=2 * count + 2, per_owner=2 * count + 2))
    first = (await store.submit(NewJob(owner="owner-0", model="sd15", kind="generate", request={}))).job
    row = (await database.read(lambda c: c.execute(select(jobs).where(jobs.c.id == first.id)))).one()
    id, rows = first.id, []
    for number in range(1, count):
        id = new_id(first.created_at, id)
        place = {"id": id, "owner": f"owner-{number % OWNERS}", "turn": number // OWNERS}
        if number <= capped:
            place |= {"owner": "capped", "turn": number - capped - 1, "at_once": 1}
        rows.append(dict(row._mapping) | place | {"request": {"prompt": "a red circle", "seed": number}})
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        await database.write(lambda c, some=some: c.execute(insert(jobs), some))


async def measure(database: Database, rounds: int) -> Seconds:
    """The seconds of each method over rounds in which one job comes and one goes, so that as many wait all the time."""
    store = JobStore(database, Bounds(waiting=100_000, per_owner=100_000))
    spent: Seconds = defaultdict(list)

    async def timed(name: str, call: Awaitable[T]) -> T:
        began = time.perf_counter()
        result = await call
        spent[name].append(time.perf_counter() - began)
        return result

    for number in range(rounds):
        new = NewJob(owner=f"owner-{number % OWNERS}", model="sd15", kind="generate", request={"seed": number})
        job = (await timed("submit", store.submit(new))).job
        await timed("get", store.get(job.id, job.owner))
        await timed("position", store.position(job.id, job.owner))
        (held,) = await timed("claim", store.claim("runner", ["sd15"], 1, 30.0))
        await timed("heartbeat", store.heartbeat([held], 30.0, {held.id: JobProgress(done=number % 20, total=20)}))
        await timed("succeed", store.succeed(held, {"images": []}))
        await timed("events", store.events(held.id, held.job.owner))
        await timed("list", store.list(held.job.owner, limit=20))
        await timed("reap", store.reap())
    return spent


async def compare(url: str, rounds: int) -> dict[int, Seconds]:
    """The measurements by how many jobs wait; the last with half of them an owner's who may run no more. Empties the
    table of jobs."""
    database = Database(url)
    await database.migrate()
    found = {}
    for size in SIZES:
        await database.write(lambda c: c.execute(delete(jobs)))
        await fill(database, size)
        found[size] = await measure(database, rounds)
        await database.write(lambda c: c.execute(delete(jobs)))
        await fill(database, size, capped=size // 2)
        await JobStore(database).claim("runner", ["sd15"], 1, 3600.0)
        found[size]["claim past one who is full"] = (await measure(database, rounds))["claim"]
    await database.close()
    return found


def quantile(seconds: list[float], share: float) -> float:
    """The smallest measurement that `share` of all do not exceed."""
    return sorted(seconds)[min(int(share * len(seconds)), len(seconds) - 1)]


def report(name: str, found: dict[int, Seconds]) -> Table:
    """One line for each method: p50 and p99 in milliseconds at each size."""
    table = Table(title=f"{name}: milliseconds with so many jobs waiting")
    table.add_column("method")
    for size in found:
        for share in ("p50", "p99"):
            table.add_column(f"{share} at {size:,}", justify="right")
    for method in found[SIZES[0]]:
        cells = [f"{1000 * quantile(spent[method], share):.2f}" for spent in found.values() for share in (0.5, 0.99)]
        table.add_row(method, *cells)
    return table


def main(
    postgresql: Annotated[
        str | None, typer.Option(help="URL of a PostgreSQL database for this alone: its jobs are deleted.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=10)] = 300,
) -> None:
    """Measure the job store on SQLite in a temporary folder, and on PostgreSQL where a URL is given."""
    with tempfile.TemporaryDirectory() as folder:
        urls = [f"sqlite:///{Path(folder) / 'jobs.db'}", *([postgresql] if postgresql else [])]
        for url in urls:
            Console().print(report(url.split(":")[0], asyncio.run(compare(url, rounds))))


if __name__ == "__main__":
    typer.run(main)
