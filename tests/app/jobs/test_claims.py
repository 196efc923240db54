"""Who gets which job: never two the same, the highest priority, fair turns, the most urgent."""

import asyncio
import sys
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, clock, one_at_a_time
from app.jobs import claiming
from app.jobs.claiming import EXPIRED_AT_ONCE
from app.jobs.job import Claim
from app.jobs.states import State
from app.jobs.store import JobStore
from app.jobs.tables import jobs
from bench.jobs import fill
from tests.app.jobs.making import ERROR, LEASE_S, claim, claim_one, new, pass_time, submit

CLAIMER = """
import asyncio, sys
from app.database import Database
from app.jobs.store import JobStore

async def main(url, name):
    database = Database(url, pool_size=2)
    store = JobStore(database)
    while claims := await store.claim(name, ["sd15"], 3, 60.0):
        for held in claims:
            print(held.id, held.attempt)
    await database.close()

asyncio.run(main(*sys.argv[1:]))
"""


def owners(claims: list[Claim]) -> str:
    return "".join(held.job.owner for held in claims)


async def claim_all(store: JobStore) -> list[Claim]:
    """One by one, as free places come."""
    claims = []
    while found := await claim(store):
        claims += found
    return claims


async def test_tasks_that_claim_at_once_never_get_the_same_job(store: JobStore) -> None:
    ids = {(await submit(store, owner=f"owner-{i % 3}")).id for i in range(60)}
    rounds = await asyncio.gather(*(claim_all(store) for _ in range(6)))
    claimed = [held.id for claims in rounds for held in claims]
    assert len(claimed) == len(set(claimed))
    left = await claim_all(store)  # a claimer that meets only locked rows goes away with nothing
    assert {*claimed, *(held.id for held in left)} == ids


async def test_a_lease_begins_when_the_claimers_turn_has_come(store: JobStore, database: Database) -> None:
    await submit(store)
    begun = asyncio.Event()

    async def busy(connection: AsyncConnection) -> float:
        await one_at_a_time(connection, "claims")
        begun.set()
        await asyncio.sleep(0.3)
        return await clock(connection)

    other = asyncio.create_task(database.write(busy))
    await begun.wait()
    [held] = await claim(store)
    assert held.job.started_at is not None
    assert held.job.started_at > await other - 0.01


async def test_what_makes_room_for_a_job_ends_before_it_begins(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the times that are written down. On SQLite the second is not claimed before the first has ended."""
    for _ in range(2):
        await submit(store, at_once=1)
    first, count, counting = await claim_one(store), claiming._running, asyncio.Event()

    async def slow(connection: AsyncConnection) -> Any:
        counting.set()
        await asyncio.sleep(0.3)
        return await count(connection)

    monkeypatch.setattr(claiming, "_running", slow)
    claimed = asyncio.create_task(claim(store))
    await counting.wait()
    ended = await store.succeed(first, {"images": []})
    [second] = await claimed or await claim(store)
    assert second.job.started_at is not None
    assert ended.finished_at is not None
    assert second.job.started_at > ended.finished_at


async def test_processes_that_claim_at_once_never_get_the_same_job(store: JobStore, url: str) -> None:
    ids = {(await submit(store, owner=f"owner-{i % 3}")).id for i in range(60)}
    pipe = asyncio.subprocess.PIPE
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", CLAIMER, url, f"runner-{i}", stdout=pipe)
        for i in range(3)
    ]
    texts = [(await asyncio.wait_for(process.communicate(), 60))[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    claimed = [line.split()[0] for text in texts for line in text.splitlines()]
    assert len(claimed) == len(set(claimed))
    assert {*claimed, *(held.id for held in await claim_all(store))} == ids


async def test_a_claim_says_whose_it_is_and_for_how_long(store: JobStore) -> None:
    job = await submit(store)
    held = await claim_one(store)
    assert (held.id, held.attempt) == (job.id, 1)
    assert held.job.state is State.RUNNING
    assert held.job.started_at is not None
    assert held.job.lease_until == held.job.started_at + LEASE_S


async def test_only_the_models_asked_for_and_no_more_than_the_limit(store: JobStore) -> None:
    for model in ("sd15", "sdxl", "sd15", "other", "sd15"):
        await submit(store, model=model)
    assert await claim(store, 5, models=()) == []
    assert [held.job.model for held in await claim(store, 3, models=("sd15", "sdxl"))] == ["sd15", "sdxl", "sd15"]
    assert [held.job.model for held in await claim(store, 3, models=("sd15", "sdxl"))] == ["sd15"]


async def test_the_highest_priority_goes_first(store: JobStore) -> None:
    made = {priority: await submit(store, priority=priority) for priority in (0, 2, 1)}
    assert [held.id for held in await claim_all(store)] == [made[2].id, made[1].id, made[0].id]


async def test_among_models_priority_and_then_age_decide(store: JobStore) -> None:
    first = await submit(store, model="sdxl")
    second = await submit(store)
    urgent = await submit(store, priority=1)
    claims = await claim(store, 3, models=("sd15", "sdxl"))
    assert [held.id for held in claims] == [urgent.id, first.id, second.id]


async def test_owners_take_turns_however_many_jobs_each_has(store: JobStore) -> None:
    for owner in "aaaaaaabbbc":
        await submit(store, owner=owner)
    assert owners(await claim_all(store)) == "abcababaaaa"


async def test_a_newcomer_is_served_within_one_round(store: JobStore) -> None:
    for owner in "aaaaaaaabbbbbbbb":
        await submit(store, owner=owner)
    served = await claim(store, 8)
    await submit(store, owner="c")
    assert owners(served) == "abababab"
    assert "c" in owners(await claim(store, 3))


async def test_an_owner_who_asks_for_one_at_a_time_does_not_starve_the_others(store: JobStore) -> None:
    for _ in range(10):
        await submit(store, owner="a")
    served = ""
    for _ in range(10):
        await submit(store, owner="b")
        served += owners(await claim(store, 1))
    assert Counter(served)["a"] >= 4


async def test_of_one_owner_the_job_that_must_start_first_goes_first(store: JobStore) -> None:
    late, never, soon = [await submit(store, deadline_s=deadline_s) for deadline_s in (300.0, None, 100.0)]
    heavy = await submit(store, deadline_s=200.0, work=150.0)
    assert [held.id for held in await claim_all(store)] == [heavy.id, soon.id, late.id, never.id]


async def test_an_urgent_job_takes_its_own_owners_turn_and_no_others(store: JobStore) -> None:
    for _ in range(3):
        await submit(store, owner="a")
    for _ in range(3):
        await submit(store, owner="b")
    urgent = await submit(store, owner="a", deadline_s=100.0)
    claims = await claim_all(store)
    assert owners(claims) == "abababa"
    assert claims[0].id == urgent.id


async def test_what_cannot_be_finished_in_time_expires_without_a_step(store: JobStore, database: Database) -> None:
    late = await submit(store, deadline_s=60.0, work=30.0)
    fine = await submit(store, deadline_s=60.0, work=1.0)
    await pass_time(database, 40.0)
    assert [held.id for held in await claim(store, 5)] == [fine.id]
    expired = await store.get(late.id, "ada")
    assert (expired.state, expired.attempt, expired.started_at) == (State.EXPIRED, 0, None)


async def test_a_claim_gets_rid_of_so_many_overdue_jobs_and_gives_out_none_of_them(
    store: JobStore, database: Database
) -> None:
    await fill(database, EXPIRED_AT_ONCE + 5)
    await database.write(lambda c: c.execute(update(jobs).values(start_by=1.0)))
    fine = await submit(store)
    assert [held.id for held in [*await claim(store, 3), *await claim(store, 3)]] == [fine.id]
    assert len((await store.list(None, states=[State.EXPIRED], limit=200)).jobs) == EXPIRED_AT_ONCE + 5


async def test_a_job_handed_back_is_the_next_one_again(store: JobStore) -> None:
    for owner in "aabb":
        await submit(store, owner=owner)
    first = await claim_one(store)
    await store.release(first)
    again = await claim_one(store)
    assert (again.id, again.attempt) == (first.id, 2)


async def test_a_job_handed_back_does_not_put_newcomers_before_everybody(store: JobStore) -> None:
    """Its old turn is long over; the newcomer starts where the others are."""
    for _ in range(6):
        await submit(store, owner="a")
    first, *_ = await claim(store, 3)
    await store.release(first)
    for _ in range(3):
        await submit(store, owner="b")
    assert owners(await claim(store, 4)) == "aaba"


async def test_jobs_of_a_worker_that_died_are_the_next_ones_again(store: JobStore) -> None:
    """The queue was empty when somebody else brought a thousand: they stand behind what runs."""
    for _ in range(6):
        await submit(store, owner="a")
    for held in await claim(store, 3):
        await store.succeed(held, {})
    last = await claim(store, 3)
    for _ in range(10):
        await submit(store, owner="b")
    for held in last:
        await store.died(held, ERROR)
    assert owners(await claim(store, 4)) == "aaab"


async def test_who_may_run_no_more_puts_no_newcomer_before_everybody(store: JobStore) -> None:
    """Ada's old turns wait while her jobs of another model run; the newcomer starts where the others are."""
    await submit(store, owner="ada", model="sdxl", at_once=1)
    (busy,) = await claim(store, models=("sdxl",))
    for owner in ("ada", *["carl"] * 6):
        await submit(store, owner=owner, at_once=1 if owner == "ada" else None)
    for held in await claim(store, 3):
        await store.succeed(held, {})
    for _ in range(3):
        await submit(store, owner="bob")
    served = [held.job.owner for held in await claim(store, 4)]
    assert set(served[:2]) == set(served[2:]) == {"bob", "carl"}
    await store.succeed(busy, {})
    assert (await claim_one(store)).job.owner == "ada"


async def test_who_asks_for_one_at_a_time_gets_no_turn_twice(store: JobStore) -> None:
    for _ in range(4):
        await submit(store, owner="a")
    served = ""
    for _ in range(6):
        if not (await store.list("b", states=[State.QUEUED])).jobs:
            await submit(store, owner="b")
        held = await claim_one(store)
        served += held.job.owner
        await store.succeed(held, {})
    assert served == "ababab"


async def test_claims_of_nothing_give_nothing(store: JobStore) -> None:
    assert await claim(store, 8) == []
    await store.submit(new())
    assert await claim(store, 0) == []


async def test_no_more_jobs_of_an_owner_run_than_may_at_once(store: JobStore) -> None:
    models = ("sd15", "sdxl")
    for n in range(6):
        await submit(store, "ada", models[n % 2], at_once=2)
    for _ in range(2):
        await submit(store, "bob")
    first = await claim(store, 8, models)
    assert Counter(held.job.owner for held in first) == {"ada": 2, "bob": 2}
    assert await claim(store, 8, models) == []
    await store.succeed(next(held for held in first if held.job.owner == "ada"), {})
    assert owners(await claim(store, 8, models)) == "ada"


async def test_past_one_of_whom_enough_run_the_highest_priority_and_the_lowest_turn_go_first(store: JobStore) -> None:
    for _ in range(3):
        await submit(store, "ada", priority=2, at_once=1)
    for owner, priority in (("bob", 0), ("carl", 0), ("carl", 1), ("carl", 0), ("bob", 0), ("dora", 0)):
        await submit(store, owner, priority=priority)
    late, urgent = await submit(store, "bob"), await submit(store, "bob", deadline_s=1000.0)
    claims = await claim(store, 20)
    assert [held.job.owner for held in claims][:2] == ["ada", "carl"]
    assert Counter(held.job.owner for held in claims[2:5]) == {"bob": 1, "carl": 1, "dora": 1}
    assert Counter(held.job.owner for held in claims) == {"ada": 1, "bob": 4, "carl": 3, "dora": 1}
    bobs = [held.id for held in claims if held.job.owner == "bob"]
    assert (bobs[0], bobs[-1]) == (urgent.id, late.id)


async def test_claims_at_once_keep_to_what_an_owner_may_have(store: JobStore) -> None:
    for n in range(12):
        await submit(store, "ada", ("sd15", "sdxl")[n % 2], at_once=3)
    rounds = await asyncio.gather(*(claim(store, 4, ("sd15", "sdxl")) for _ in range(6)))
    assert sum(len(claims) for claims in rounds) + len(await claim(store, 4, ("sd15", "sdxl"))) == 3
