"""Batches in the store, on both databases: all lines or none, bounds of their own, counts, cancelling in pieces."""

import asyncio

import pytest

from app.database import Database
from app.jobs import batches
from app.jobs.batches import BatchSubmission, NewLine
from app.jobs.states import State
from app.jobs.store import JobStore
from app.jobs.submission import Bounds
from models.errors import InvalidRequest, NotFound, Overloaded
from tests.app.jobs.making import ERROR, claim, claim_one, new, pass_time, submit
from tests.app.jobs.test_submission import key

THOUSANDS = 3000


def lines(count: int, owner: str = "ada", priority: int = -1) -> list[NewLine]:
    return [NewLine(custom_id=f"line-{n}", job=new(owner, priority=priority)) for n in range(1, count + 1)]


async def test_a_batch_is_a_job_for_each_line(store: JobStore) -> None:
    batch = (await store.submit_batch("ada", lines(3))).batch
    assert (batch.total, batch.counts, batch.finished, batch.started_at) == (3, {State.QUEUED: 3}, False, None)
    assert await store.batch(batch.id, "ada") == batch
    held = [await claim_one(store) for _ in range(3)]
    assert [job.id for job in held] == sorted(job.id for job in held), "in the order of the lines"
    assert len(await store.events(held[0].id, "ada")) == 2
    await store.succeed(held[1], {"images": []})
    await store.fail(held[0], ERROR, retry=False)
    now = await store.batch(batch.id, None)
    assert now.counts == {State.FAILED: 1, State.SUCCEEDED: 1, State.RUNNING: 1}
    assert (now.finished, now.started_at is None, now.finished_at) == (False, False, None)
    done = await store.finished_lines(batch.id, "ada", 0, 10)
    assert [(line.number, line.custom_id, line.job.state) for line in done] == [
        (1, "line-1", State.FAILED),
        (2, "line-2", State.SUCCEEDED),
    ]
    assert [line.number for line in await store.finished_lines(batch.id, "ada", 1, 10)] == [2]
    await store.succeed(held[2], {"images": []})
    now = await store.batch(batch.id, None)
    assert now.finished
    assert now.finished_at is not None


async def test_thousands_of_lines_are_one_transaction(store: JobStore) -> None:
    batch = (await store.submit_batch("ada", lines(THOUSANDS))).batch
    assert batch.counts == {State.QUEUED: THOUSANDS}


async def test_lines_take_turns_with_others_and_wait_for_what_is_urgent(store: JobStore) -> None:
    await store.submit_batch("ada", lines(4))
    await submit(store, "bob", priority=-1)
    await submit(store, "bob", priority=0)
    owners = [job.job.owner for job in await claim(store, 6)]
    assert owners[0] == "bob", "what is urgent goes first"
    assert owners[1:3] in (["ada", "bob"], ["bob", "ada"]), "a newcomer's first line stands beside the first"


async def test_lines_have_bounds_of_their_own(database: Database) -> None:
    bounds = Bounds(waiting=1, per_owner=1, lines=5, lines_per_owner=3)
    store = JobStore(database, bounds)
    with pytest.raises(Overloaded, match="0 lines of batches of this caller"):
        await store.submit_batch("ada", lines(4))
    await store.submit_batch("ada", lines(3))
    with pytest.raises(Overloaded, match="of this caller"):
        await store.submit_batch("ada", lines(1))
    with pytest.raises(Overloaded, match="wait already"):
        await store.submit_batch("bob", lines(3, "bob"))
    with pytest.raises(Overloaded):
        await store.check_room_for_lines("bob", 3)
    await store.submit_batch("bob", lines(2, "bob"))
    await submit(store, "ada")  # which lines do not keep from waiting
    with pytest.raises(Overloaded):
        await submit(store, "bob")
    assert len(await store.batches(None, None, 10)) == 2


async def test_a_key_makes_one_batch(store: JobStore) -> None:
    found = await asyncio.gather(*(store.submit_batch("ada", lines(2), key(route="/v1/batches")) for _ in range(4)))
    assert len({one.batch.id for one in found}) == 1
    assert sorted(one.replayed for one in found) == [False, True, True, True]
    again = await store.earlier_batch("ada", key(route="/v1/batches"))
    assert again == BatchSubmission(found[0].batch, replayed=True)
    assert await store.earlier_batch("bob", key(route="/v1/batches")) is None
    with pytest.raises(InvalidRequest, match="another body"):
        await store.submit_batch("ada", lines(2), key(route="/v1/batches", body=1))


async def test_a_batch_is_cancelled_piece_by_piece(store: JobStore) -> None:
    count = batches.ENDED_AT_ONCE + 5
    batch = (await store.submit_batch("ada", lines(count))).batch
    done, running = await claim(store, 2)
    await store.succeed(done, {"images": []})
    assert await store.cancel_lines(batch.id, "ada")
    assert not await store.cancel_lines(batch.id, "ada")
    now = await store.batch(batch.id, "ada")
    assert now.counts == {State.SUCCEEDED: 1, State.CANCELLING: 1, State.CANCELLED: count - 2}
    assert now.cancelling_at is not None
    assert await claim(store) == []
    await store.cancelled(running)
    assert (await store.batch(batch.id, "ada")).finished


async def test_a_batch_that_is_done_is_not_cancelled(store: JobStore) -> None:
    batch = (await store.submit_batch("ada", lines(1))).batch
    await store.succeed(await claim_one(store), {"images": []})
    assert not await store.cancel_lines(batch.id, "ada")
    assert (await store.batch(batch.id, "ada")).cancelling_at is None


async def test_batches_are_listed_the_newest_first(store: JobStore) -> None:
    ids = [(await store.submit_batch("ada", lines(1))).batch.id for _ in range(3)]
    await store.submit_batch("bob", lines(1, "bob"))
    assert [one.id for one in await store.batches("ada", None, 2)] == ids[::-1]  # one more than asked for
    assert [one.id for one in await store.batches("ada", ids[1], 2)] == [ids[0]]
    assert len(await store.batches(None, None, 10)) == 4
    with pytest.raises(InvalidRequest, match="limit"):
        await store.batches("ada", None, 0)


async def test_anothers_batch_is_not_found(store: JobStore) -> None:
    id = (await store.submit_batch("ada", lines(1))).batch.id
    for wrong in (id, "no id", "0" * 32):
        for look in (store.batch(wrong, "bob"), store.cancel_lines(wrong, "bob"), store.batches("bob", wrong, 1)):
            with pytest.raises(NotFound):
                await look
        with pytest.raises(NotFound):
            await store.finished_lines(wrong, "bob", 0, 1)


async def test_a_batch_is_forgotten_with_its_jobs(store: JobStore, database: Database) -> None:
    old = (await store.submit_batch("ada", lines(2))).batch
    for held in await claim(store, 2):
        await store.succeed(held, {"images": []})
    await pass_time(database, 100.0)
    for _ in range(3):
        await store.prune(keep_s=10.0, forget_s=50.0)
    assert (await store.list(None)).jobs == ()
    await database.write(lambda c: batches.forget(c, old.created_at + 1.0, 10))
    with pytest.raises(NotFound):
        await store.batch(old.id, None)
