"""One run from begin to end: everything is started, the plan is carried out, how it all ended is written down."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from app.database import Database
from app.jobs.outbox import Outbox
from app.keys import registry
from app.keys.caller import Limits
from tests.faults import ending
from tests.faults.client import Clients
from tests.faults.databases import DATABASES, DatabaseUnderTest
from tests.faults.injector import Injector
from tests.faults.log import Log, Owner
from tests.faults.places import PLACES, Place
from tests.faults.plan import OWNERS, Plan
from tests.faults.receiver import PATH, Receiver, receiving
from tests.faults.system import Surroundings, System
from tests.faults.twins import twins

# After the last fault everything has to come to its end. A webhook whose second attempt was lost, too, is sent again
# five minutes later.
SETTLE_S = 600.0
COMPARE_S = 10.0  # for the pictures of a job, each drawn again
AT_ONCE = 2
SIGNALS = (signal.SIGINT, signal.SIGTERM)
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be run, and where its files go."""

    plan: Plan
    database: str
    store: str
    folder: Path

    @property
    def log(self) -> Path:
        """The event log, one JSON object on each line."""
        return self.folder / "events.jsonl"


async def run(wanted: Run, console: Console) -> None:
    """Leaves the log behind, and no process. What has not come to its end in time is the checker's to judge.

    SIGINT and SIGTERM cancel it, once: what it started is stopped then, whatever else is signalled.
    """
    _cancel_on_signals()
    async with AsyncExitStack() as stack:
        place: Place = await stack.enter_async_context(PLACES[wanted.store](wanted.folder))
        tested: DatabaseUnderTest = await stack.enter_async_context(DATABASES[wanted.database](wanted.folder))
        log = Log(wanted.log)
        stack.callback(log.close)
        receiver = Receiver(log, {job.number: job.deaf for job in wanted.plan.jobs})
        hooks = await stack.enter_async_context(receiving(receiver))
        surroundings = Surroundings(folder=wanted.folder, database=tested.url, place=place, hooks_port=hooks.port)
        database = await stack.enter_async_context(_migrated(tested.url))
        owners = await _with_keys(database, surroundings, log)
        with console.status("starting the server"):
            system = await stack.enter_async_context(System(surroundings))
        clients = Clients(system.address, hooks.url(PATH), owners, log)
        stack.push_async_callback(clients.close)
        secrets = [await Outbox(database).secret(owner) for _, owner in owners]
        receiver.secrets = {job.number: secrets[job.owner] for job in wanted.plan.jobs}
        injector = Injector(system, tested, place, log)
        async with _bars(console, wanted.plan) as (progress, faults, jobs):
            began = asyncio.get_running_loop().time()
            async with _at_most(_lasts_s(wanted.plan) + SETTLE_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(injector.run(wanted.plan.faults, began, lambda: progress.advance(faults)))
                tasks.create_task(clients.run(wanted.plan.jobs, began, lambda _: progress.advance(jobs)))
        with console.status("waiting for the last webhooks"):
            async with _at_most(SETTLE_S):
                await ending.settled(database)
        with console.status("comparing the pictures"):
            ended = await ending.write_rows(database, log)
            async with _at_most(SETTLE_S + COMPARE_S * len(ended)), twins(system.model) as alone:
                await ending.write_pictures(ended, wanted.plan.jobs, clients, alone, log)


def _cancel_on_signals() -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def cancel() -> None:
        for number in SIGNALS:
            loop.add_signal_handler(number, lambda: None)
        task.cancel()

    for number in SIGNALS:
        loop.add_signal_handler(number, cancel)


@asynccontextmanager
async def _migrated(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    try:
        await database.migrate()
        yield database
    finally:
        await database.close()


async def _with_keys(database: Database, surroundings: Surroundings, log: Log) -> Sequence[tuple[str, str]]:
    """A key and its caller's id for each owner; the last may have fewer jobs at a time than would run."""
    keys = registry.opened(database, str(surroundings.secret_file))
    made = []
    for i in range(OWNERS):
        limits = Limits(concurrent_jobs=AT_ONCE if i == OWNERS - 1 else None)
        key, text = await keys.create(f"owner {i}", ("generate", "jobs"), limits)
        log.write(Owner(id=key.caller, at_once=limits.concurrent_jobs))
        made.append((text, key.caller))
    return made


@asynccontextmanager
async def _at_most(seconds: float) -> AsyncIterator[None]:
    """Goes on after that time, whatever has not ended by then."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            yield


def _lasts_s(plan: Plan) -> float:
    return max([0.0, *(job.at_s for job in plan.jobs), *(fault.at_s + fault.lasts_s for fault in plan.faults)])


@asynccontextmanager
async def _bars(console: Console, plan: Plan) -> AsyncIterator[tuple[Progress, TaskID, TaskID]]:
    with Progress(*COLUMNS, console=console) as progress:
        faults = progress.add_task("faults", total=len(plan.faults))
        yield progress, faults, progress.add_task("jobs", total=len(plan.jobs))
