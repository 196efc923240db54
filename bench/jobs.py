"""`python -m bench.jobs`: what looks at jobs and the job store's methods cost with 10 and with 10,000 jobs waiting."""

import asyncio
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx2
import typer
from rich.console import Console
from sqlalchemy import delete, insert, select

from app.database import Database
from app.jobs.job import JobProgress, NewJob
from app.jobs.journal import new_id
from app.jobs.store import JobStore
from app.jobs.submission import Bounds
from app.jobs.tables import jobs
from bench import readme
from bench.quantile import quantile
from bench.report import Sheet
from bench.serving import Serving, end_on_sigterm

T = TypeVar("T")
Seconds = dict[str, list[float]]

SIZES = (10, 10_000)
OWNERS = 10
BATCH = 1000
WARM_UP = 50
LOOK = "GET /v1/jobs/{id}"
MODEL = "elsewhere"  # which the server does not run: its jobs wait


async def fill(database: Database, count: int, capped: int = 0, model: str = "sd15") -> None:
    """Puts `count` queued jobs of several owners in at once, as so many submissions would have left them.

    The first `capped` of them are another owner's, who has all the first turns, and of whom one job at a time may run.
    """
    store = JobStore(database, Bounds(waiting=2 * count + 2, per_owner=2 * count + 2))
    first = (await store.submit(NewJob(owner="owner-0", model=model, kind="generate", request={}))).job
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
        new = NewJob(owner=f"owner-{number % OWNERS}", model=MODEL, kind="generate", request={"seed": number})
        job = (await timed("submit", store.submit(new))).job
        await timed("get", store.get(job.id, job.owner))
        await timed("position", store.position(job.id, job.owner))
        (held,) = await timed("claim", store.claim("runner", [MODEL], 1, 30.0))
        await timed("heartbeat", store.heartbeat([held], 30.0, {held.id: JobProgress(done=number % 20, total=20)}))
        await timed("succeed", store.succeed(held, {"images": []}))
        await timed("events", store.events(held.id, held.job.owner))
        await timed("list", store.list(held.job.owner, limit=20))
        await timed("reap", store.reap())
    return spent


@asynccontextmanager
async def gateway(url: str, folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """The whole server on a database."""
    from bench.server import one_model, shipped  # which need torch

    def config(_: str) -> dict[str, Any]:
        served = one_model(shipped(folder), {"max_rows": 2, "threads": 1}, jobs=True)
        for application in served["applications"]:
            if application["name"] in ("gateway", "jobs"):
                application["args"] |= {"database": url}
        return served

    end_on_sigterm()
    async with Serving(folder, config) as serving, httpx2.AsyncClient(base_url=serving.address, timeout=30) as client:
        yield client


async def look(client: httpx2.AsyncClient, database: Database, rounds: int) -> list[float]:
    """The seconds of so many looks at queued jobs, one after another, through HTTP."""
    ids = list(await database.read(lambda c: c.scalars(select(jobs.c.id).order_by(jobs.c.id))))
    spent = []
    for number in range(WARM_UP + rounds):
        began = time.perf_counter()
        answer = await client.get(f"/v1/jobs/{ids[number * len(ids) // (WARM_UP + rounds)]}")
        spent.append(time.perf_counter() - began)
        if answer.json().get("position") is None:
            raise RuntimeError(f"{answer.status_code} {answer.text}")
    return spent[WARM_UP:]


async def compare(url: str, rounds: int) -> dict[int, Seconds]:
    """The measurements by how many jobs wait; the last with half of them an owner's who may run no more. Empties the
    table of jobs."""
    database = Database(url)
    await database.migrate()
    found: dict[int, Seconds] = {}
    with tempfile.TemporaryDirectory(prefix="heliograph-bench-") as folder:
        async with gateway(url, Path(folder)) as client:
            for size in SIZES:
                await database.write(lambda c: c.execute(delete(jobs)))
                await fill(database, size, model=MODEL)
                looks = await look(client, database, rounds)
                found[size] = {LOOK: looks} | await measure(database, rounds)
                await database.write(lambda c: c.execute(delete(jobs)))
                await fill(database, size, capped=size // 2, model=MODEL)
                await JobStore(database).claim("runner", [MODEL], 1, 3600.0)
                found[size]["claim past one who is full"] = (await measure(database, rounds))["claim"]
    await database.close()
    return found


def sheet_of(name: str, found: Mapping[int, Seconds]) -> Sheet:
    """One line for each method: p50 and p99 in milliseconds at each size, and the ratio of the p99s."""
    columns = [f"{share} at {size:,}" for size in found for share in ("p50", "p99")]
    rows = []
    for method in found[SIZES[0]]:
        cells = [1000 * quantile(spent[method], share) for spent in found.values() for share in (0.5, 0.99)]
        rows.append([method, *(f"{cell:.2f}" for cell in cells), f"{cells[3] / cells[1]:.2f}"])
    title = f"{name}: milliseconds with so many jobs waiting"
    return Sheet(title=title, columns=["", *columns, "p99 / p99"], rows=rows)


def main(
    postgresql: Annotated[
        str | None, typer.Option(help="URL of a PostgreSQL database for this alone: its jobs are deleted.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=10)] = 500,
    publish: Annotated[bool, typer.Option("--publish", help="Also put the tables into bench/README.md.")] = False,
) -> None:
    """Measure looks at jobs through HTTP, and the job store itself, on SQLite and, where a URL is given, PostgreSQL."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from bench.machine import Machine

    console, machine = Console(), Machine.here(1)
    parts: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        urls = [f"sqlite:///{Path(folder) / 'jobs.db'}", *([postgresql] if postgresql else [])]
        for url in urls:
            sheet = sheet_of(url.split(":")[0], asyncio.run(compare(url, rounds)))
            console.print(sheet.rich())
            parts.append(sheet.markdown())
    parts.append(f"{rounds} rounds. Machine: {machine}.")
    if machine.busy:
        parts.append("The machine was busy: these figures are not worth keeping.")
    console.print(*parts[len(urls) :], sep="\n", highlight=False)
    if publish:
        readme.publish("jobs", "\n\n".join(parts))


if __name__ == "__main__":
    typer.run(main)
