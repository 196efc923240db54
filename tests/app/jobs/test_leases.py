"""What happens when a runner, a worker or a clock does not do what it should."""

import ast
import time
from pathlib import Path

import pytest

import app.jobs
from app.database import Database
from app.jobs import making
from app.jobs.job import Claim, JobProgress, Stale
from app.jobs.states import State
from app.jobs.store import JobStore
from tests.app.jobs.making import ERROR, LEASE_S, claim, claim_one, pass_time, submit


async def lose_runner(store: JobStore, database: Database) -> None:
    await pass_time(database, LEASE_S + 1)
    await store.reap()


async def test_a_job_whose_runner_is_gone_is_run_again(store: JobStore, database: Database) -> None:
    job = await submit(store)
    await claim_one(store)
    assert (await store.reap()).queued == ()
    await pass_time(database, LEASE_S + 1)
    assert (await store.reap()).queued == (job.id,)
    again = await claim_one(store)
    assert (again.id, again.attempt, again.job.deaths) == (job.id, 2, 1)


async def test_a_heartbeat_keeps_the_lease(store: JobStore, database: Database) -> None:
    await submit(store)
    held = await claim_one(store)
    for _ in range(4):
        await pass_time(database, LEASE_S * 0.8)
        assert (await store.heartbeat([held], LEASE_S)).lost == frozenset()
        assert (await store.reap()).queued == ()


async def test_nothing_that_a_stale_attempt_writes_counts(store: JobStore, database: Database) -> None:
    await submit(store)
    stale = await claim_one(store)
    await lose_runner(store, database)
    present = await claim_one(store)
    for write in (
        store.succeed(stale, {"images": ["stale"]}),
        store.fail(stale, ERROR, retry=False),
        store.fail(stale, ERROR, retry=True),
        store.output(stale, "stale"),
        store.release(stale),
        store.died(stale, ERROR),
        store.cancelled(stale),
    ):
        with pytest.raises(Stale):
            await write
    assert (await store.heartbeat([stale], LEASE_S, {stale.id: JobProgress(done=9, total=9)})).lost == {stale.id}
    done = await store.succeed(present, {"images": ["present"]})
    assert (done.result, done.outputs, done.progress) == ({"images": ["present"]}, (), None)


async def test_of_two_attempts_that_finish_one_wins_also_after_the_end(store: JobStore, database: Database) -> None:
    await submit(store)
    stale = await claim_one(store)
    await lose_runner(store, database)
    await store.succeed(await claim_one(store), {"images": ["present"]})
    with pytest.raises(Stale):
        await store.succeed(stale, {"images": ["stale"]})


async def test_a_word_said_twice_is_one_because_its_answer_may_be_lost(store: JobStore) -> None:
    await submit(store)
    held = await claim_one(store)
    first = await store.succeed(held, {"images": ["a"]})
    assert await store.succeed(held, {"images": ["b"]}) == first


async def test_a_job_that_takes_two_runners_with_it_is_poisoned(store: JobStore, database: Database) -> None:
    job = await submit(store)
    for _ in range(2):
        await claim_one(store)
        await lose_runner(store, database)
    failed = await store.get(job.id, "ada")
    assert failed.state is State.FAILED
    assert failed.error is not None
    assert (failed.error.code, failed.error.retryable, failed.deaths) == ("poisoned", False, 2)
    assert await claim(store) == []


async def test_a_worker_that_dies_counts_as_a_runner_does(store: JobStore) -> None:
    await submit(store)
    states = [(await store.died(await claim_one(store), ERROR)).state for _ in range(2)]
    assert states == [State.QUEUED, State.FAILED]


async def test_neither_handing_back_nor_errors_make_poison(store: JobStore) -> None:
    await submit(store)
    for _ in range(5):
        await store.release(await claim_one(store))
    await store.fail(await claim_one(store), ERROR, retry=True)
    assert (await claim_one(store)).job.deaths == 0


async def test_a_killer_takes_no_neighbour_with_it(store: JobStore, database: Database) -> None:
    """Five jobs share a worker and one of them kills it, twice: then each of them runs alone."""
    neighbours = [await submit(store) for _ in range(5)]
    killer = neighbours[1].id
    assert len(await claim(store, 5)) == 5
    await lose_runner(store, database)
    healthy = await submit(store)
    ends = {}
    for _ in range(20):
        running = await claim(store, 5)
        assert len(running) <= 1 or all(held.job.deaths < 2 for held in running)
        if any(held.id == killer for held in running):
            await lose_runner(store, database)
        else:
            ends |= {held.id: (await store.succeed(held, {})).state for held in running}
    assert (await store.get(killer, "ada")).state is State.FAILED
    assert ends == dict.fromkeys({job.id for job in (*neighbours, healthy)} - {killer}, State.SUCCEEDED)


async def test_all_that_shared_a_worker_run_again_at_once(store: JobStore, database: Database) -> None:
    jobs = [await submit(store) for _ in range(5)]
    await claim(store, 5)
    await lose_runner(store, database)
    assert [held.id for held in await claim(store, 5)] == [job.id for job in jobs]


async def test_one_death_by_chance_and_one_beside_a_killer_make_no_poison(store: JobStore, database: Database) -> None:
    unlucky = await submit(store)
    await claim(store)
    await lose_runner(store, database)
    killer = await submit(store)
    assert len(await claim(store, 2)) == 2
    await lose_runner(store, database)
    (alone,) = await claim(store, 2)
    assert (alone.id, (await store.succeed(alone, {})).state) == (unlucky.id, State.SUCCEEDED)
    await claim_one(store)
    await lose_runner(store, database)
    failed = await store.get(killer.id, None)
    assert (failed.state, failed.deaths) == (State.FAILED, 2)


async def test_company_that_came_later_or_has_left_counts(store: JobStore, database: Database) -> None:
    first = await submit(store)
    await store.died(await claim_one(store), ERROR)
    again = await claim_one(store)
    await submit(store)
    guest = await claim_one(store)
    await store.succeed(guest, {})
    assert (await store.died(again, ERROR)).state is State.QUEUED
    assert (await store.died(await claim_one(store), ERROR)).state is State.FAILED
    assert (await store.get(first.id, None)).deaths == 3


async def test_a_suspect_of_another_model_clears_nobody(store: JobStore, database: Database) -> None:
    killer, other = await submit(store), await submit(store, model="sdxl")
    for _ in range(2):
        assert {held.id for held in await claim(store, 2, models=("sd15", "sdxl"))} == {killer.id, other.id}
        await lose_runner(store, database)
    assert [(await store.get(job.id, None)).state for job in (killer, other)] == [State.FAILED, State.FAILED]


async def test_a_suspect_never_has_company(store: JobStore, database: Database) -> None:
    first, second = await submit(store), await submit(store)
    for _ in range(2):
        await claim(store, 2)
        await lose_runner(store, database)
    third, elsewhere = await submit(store), await submit(store, model="sdxl")
    for suspect in (first, second):
        both = await claim(store, 5, models=("sd15", "sdxl"))
        assert {held.id for held in both} <= {suspect.id, elsewhere.id}
        held = next(held for held in both if held.id == suspect.id)
        assert await claim(store, 5) == []
        await store.succeed(held, {})
    assert (await claim_one(store)).id == third.id


async def test_a_suspect_is_not_passed_by_those_behind_it(store: JobStore, database: Database) -> None:
    other, suspect = await submit(store), await submit(store)
    for _ in range(2):
        await claim(store, 2)
        await lose_runner(store, database)
    held = await claim_one(store)
    assert held.id == other.id
    await store.succeed(held, {})
    urgent = await submit(store, priority=1)
    before = await claim_one(store)
    assert before.id == urgent.id
    await submit(store)
    assert await claim(store, 5) == []
    await store.succeed(before, {})
    assert [held.id for held in await claim(store, 5)] == [suspect.id]


async def test_what_ran_out_while_the_database_was_away_begins_anew(store: JobStore, database: Database) -> None:
    """The reaper may be the first whom the database answers again; the runners come within a lease."""
    living = await submit(store)
    held = await claim_one(store)
    await pass_time(database, LEASE_S + 1)
    reaped = await store.reap(since=time.monotonic() - LEASE_S)
    assert (reaped.queued, reaped.begun_anew) == ((), 1)
    assert (await store.heartbeat([held], LEASE_S)).lost == frozenset()
    await pass_time(database, LEASE_S + 1)
    assert (await store.reap(since=time.monotonic() - 1.0)).queued == (living.id,)


async def test_what_ran_out_before_the_database_was_away_is_lost(store: JobStore, database: Database) -> None:
    job = await submit(store)
    await claim_one(store)
    await pass_time(database, 2 * LEASE_S)
    assert (await store.reap(since=time.monotonic() - 0.9 * LEASE_S)).queued == (job.id,)


async def test_a_cancelled_job_whose_runner_is_gone_is_cancelled(store: JobStore, database: Database) -> None:
    await submit(store)
    held = await claim_one(store)
    await store.cancel(held.id, "ada")
    await pass_time(database, LEASE_S + 1)
    assert (await store.reap()).ended == (held.id,)
    assert (await store.get(held.id, "ada")).state is State.CANCELLED


async def test_a_running_job_ends_at_its_deadline_and_its_runner_hears_of_it(
    store: JobStore, database: Database
) -> None:
    await submit(store, deadline_s=20.0)
    held = await claim_one(store)
    await pass_time(database, 21.0)
    assert (await store.reap()).ended == (held.id,)
    assert (await store.heartbeat([held], LEASE_S)).lost == {held.id}
    with pytest.raises(Stale):
        await store.succeed(held, {})


async def test_queued_jobs_expire_also_where_nobody_claims(store: JobStore, database: Database) -> None:
    jobs = [await submit(store, deadline_s=20.0) for _ in range(3)]
    await pass_time(database, 21.0)
    assert set((await store.reap()).ended) == {job.id for job in jobs}


async def test_reaping_does_a_bounded_part_at_a_time(store: JobStore, database: Database) -> None:
    for _ in range(5):
        await submit(store, deadline_s=20.0)
    await pass_time(database, 21.0)
    assert [len((await store.reap(2)).ended) for _ in range(4)] == [2, 2, 1, 0]


async def test_a_clock_set_back_does_not_keep_the_jobs_of_dead_runners(store: JobStore, database: Database) -> None:
    await submit(store)
    await claim_one(store)
    await pass_time(database, -3600.0)
    assert (await store.reap()).begun_anew == 1
    assert (await store.reap()).begun_anew == 0
    await lose_runner(store, database)
    assert (await claim_one(store)).attempt == 2


async def test_a_clock_set_back_loses_nothing_of_living_runners(store: JobStore, database: Database) -> None:
    await submit(store)
    held = await claim_one(store)
    await pass_time(database, -3600.0)
    await store.reap()
    assert (await store.heartbeat([held], LEASE_S)).lost == frozenset()
    assert (await store.succeed(held, {})).state is State.SUCCEEDED


async def test_a_clock_set_forward_costs_an_attempt_but_no_job(store: JobStore, database: Database) -> None:
    await submit(store)
    held = await claim_one(store)
    await pass_time(database, 3600.0)
    await store.reap()
    assert (await store.heartbeat([held], LEASE_S)).lost == {held.id}
    again: Claim = await claim_one(store)
    assert (await store.succeed(again, {})).state is State.SUCCEEDED


def test_no_clock_but_the_databases_is_asked() -> None:
    """A process's own may tell how long something takes, and a result when it was made; it decides about nothing."""
    for path in {*Path(app.jobs.__path__[0]).glob("*.py"), Path("app/database.py")} - {Path(making.__file__)}:
        names = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        asked = {node.attr for node in names if isinstance(node.value, ast.Name) and node.value.id == "time"}
        assert asked <= {"monotonic"}, path
        assert "datetime" not in path.read_text(), path
