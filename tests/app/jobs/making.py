"""Jobs for tests, and the ways into every state."""

from typing import Any

from sqlalchemy import update

from app.database import Database
from app.jobs.job import Claim, Job, JobError, NewJob, Webhook
from app.jobs.states import State
from app.jobs.store import JobStore
from app.jobs.tables import jobs

LEASE_S = 30.0
ERROR = JobError(code="engine_fault", message="the engine stumbled", retryable=True)
HOOK = Webhook(url="https://example.com/hook", events=("start", "output", "logs", "completed"))


def new(owner: str = "ada", model: str = "sd15", **options: Any) -> NewJob:
    return NewJob(owner=owner, model=model, kind="generate", request={"prompt": "a red circle"}, **options)


async def submit(store: JobStore, *args: Any, **options: Any) -> Job:
    return (await store.submit(new(*args, **options))).job


async def claim(store: JobStore, limit: int = 1, models: tuple[str, ...] = ("sd15",)) -> list[Claim]:
    return list(await store.claim("runner-1", models, limit, LEASE_S))


async def claim_one(store: JobStore) -> Claim:
    (only,) = await claim(store)
    return only


async def pass_time(database: Database, seconds: float) -> None:
    """Time passes for every job: what is `seconds` from now becomes now. The same as a clock that is set forward."""
    moments = (jobs.c.start_by, jobs.c.deadline_at, jobs.c.created_at, jobs.c.started_at, jobs.c.finished_at)
    changes = {column.name: column - seconds for column in (*moments, jobs.c.lease_until, jobs.c.told_at)}
    await database.write(lambda c: c.execute(update(jobs).values(changes)))


async def brought_to(state: State, store: JobStore, database: Database) -> Claim:
    """A job in that state, as its first attempt's claim."""
    deadline_s = 100.0 if state is State.EXPIRED else None
    await submit(store, deadline_s=deadline_s)
    held = await claim_one(store)
    match state:
        case State.QUEUED:
            await store.release(held)
        case State.CANCELLING:
            await store.cancel(held.id, "ada")
        case State.SUCCEEDED:
            await store.succeed(held, {"images": []})
        case State.FAILED:
            await store.fail(held, ERROR, retry=False)
        case State.CANCELLED:
            await store.cancel(held.id, "ada")
            await store.cancelled(held)
        case State.EXPIRED:
            await pass_time(database, 200.0)
            await store.reap()
    assert (await store.get(held.id, "ada")).state is state
    return held
