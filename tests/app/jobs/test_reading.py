"""What callers see: pages, places in the queue, events; and what is left after pruning."""

import pytest
from sqlalchemy import func, select

from app.database import Database
from app.jobs import journal, reading
from app.jobs.job import JobProgress, Position
from app.jobs.outbox import Outbox
from app.jobs.states import State
from app.jobs.store import JobStore
from app.jobs.tables import deliveries
from bench.jobs import fill
from models.errors import InvalidRequest, NotFound
from tests.app.jobs.making import ERROR, HOOK, LEASE_S, claim, claim_one, pass_time, submit


async def test_pages_are_newest_first_and_leave_out_nothing(store: JobStore) -> None:
    ids = [(await submit(store)).id for _ in range(7)]
    seen, cursor = [], None
    for expected in (3, 3, 1):
        page = await store.list("ada", cursor=cursor, limit=3)
        assert len(page.jobs) == expected
        seen += [job.id for job in page.jobs]
        cursor = page.next
        await submit(store)  # what comes in between does not move the pages
    assert cursor is None
    assert seen == ids[::-1]


async def test_ids_have_the_order_of_submissions_and_do_not_repeat(store: JobStore) -> None:
    ids = [(await submit(store)).id for _ in range(20)]
    assert ids == sorted(set(ids))
    assert all(len(id) == 32 and id[12] == "7" and id[16] in "89ab" for id in ids)


def test_an_id_is_larger_than_the_last_also_where_the_clock_was_set_back() -> None:
    first = journal.new_id(1_000_000.0)
    second = journal.new_id(500_000.0, first)
    assert second > first
    assert int(second[:12], 16) == 1_000_000_000
    assert journal.new_id(1_000_000.0)[16:] != journal.new_id(1_000_000.0)[16:]


async def test_filters_narrow_a_list(store: JobStore) -> None:
    ada, bob = await submit(store, "ada"), await submit(store, "bob", model="sdxl")
    held = await claim_one(store)
    assert held.id == ada.id
    assert [job.id for job in (await store.list("ada")).jobs] == [ada.id]
    assert [job.id for job in (await store.list(None)).jobs] == [bob.id, ada.id]
    assert [job.id for job in (await store.list(None, states=[State.QUEUED, State.FAILED])).jobs] == [bob.id]
    assert [job.id for job in (await store.list(None, model="sd15")).jobs] == [ada.id]
    assert (await store.list(None, kind="upscale")).jobs == ()


@pytest.mark.parametrize("cursor", ["", "nonsense", "AAAA", "é", "*" * 22])
async def test_a_cursor_that_is_none_is_refused(cursor: str, store: JobStore) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await store.list("ada", cursor=cursor)
    assert refused.value.field == "cursor"


@pytest.mark.parametrize("limit", [0, -1, 201])
async def test_a_page_has_a_bound(limit: int, store: JobStore) -> None:
    with pytest.raises(InvalidRequest, match="1 to 200"):
        await store.list("ada", limit=limit)


async def test_a_position_counts_what_goes_before(store: JobStore) -> None:
    for i in range(3):
        await submit(store, work=10.0 + i)
    await submit(store, model="sdxl", work=1000.0)
    last = await submit(store, work=5.0)
    assert await store.position(last.id, "ada") == Position(3, 33.0)
    first = await submit(store, priority=1)
    assert await store.position(first.id, "ada") == Position(0, 0.0)
    assert await store.position(last.id, "ada") == Position(4, 34.0)
    for held in await claim(store, 4):
        assert await store.position(held.id, "ada") == Position(0, 0.0)
    assert await store.position(last.id, "ada") == Position(0, 0.0)


async def test_a_position_says_what_a_claim_does(store: JobStore) -> None:
    jobs = [await submit(store, owner) for owner in "aaabbcdddd"]
    ahead = {job.id: (await store.position(job.id, None)).ahead for job in jobs}
    order = [held.id for held in await claim(store, 10)]
    assert [ahead[id] for id in order] == list(range(10))


async def test_a_position_is_counted_up_to_a_bound(store: JobStore, database: Database) -> None:
    await fill(database, reading.POSITION_LIMIT + 1)
    last = await submit(store, priority=-1)
    position = await store.position(last.id, "ada")
    assert (position.ahead, position.exact) == (reading.POSITION_LIMIT, False)


async def test_events_tell_a_job_from_beginning_to_end(store: JobStore, database: Database) -> None:
    job = await submit(store)
    held = await claim_one(store)
    await store.heartbeat([held], LEASE_S, {job.id: JobProgress(done=5, total=20, phase="denoise")})
    await store.output(held, {"key": "a"})
    await store.fail(held, ERROR, retry=True)
    await store.succeed(await claim_one(store), {"images": ["a"]})
    events = await store.events(job.id, "ada")
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [(event.kind, event.data.get("state")) for event in events] == [
        ("state", "queued"),
        ("state", "running"),
        ("progress", None),
        ("output", None),
        ("state", "queued"),
        ("state", "running"),
        ("state", "succeeded"),
    ]
    assert events[2].data == {"done": 5, "total": 20, "phase": "denoise"}
    assert events[3].data == {"index": 0, "output": {"key": "a"}}
    assert events[4].data["reason"] == "error"
    assert events[4].data["error"]["code"] == ERROR.code
    assert [event.at for event in events] == sorted(event.at for event in events)


async def test_events_are_taken_up_where_a_reader_left_off(store: JobStore) -> None:
    job = await submit(store)
    await store.succeed(await claim_one(store), {})
    everything = await store.events(job.id, "ada")
    assert await store.events(job.id, "ada", after_seq=1) == everything[1:]
    assert await store.events(job.id, "ada", after_seq=1, limit=1) == everything[1:2]
    assert await store.events(job.id, "ada", after_seq=99) == ()
    with pytest.raises(InvalidRequest, match="1 to 1000"):
        await store.events(job.id, "ada", limit=1001)


async def test_progress_is_kept_at_once_and_told_twice_a_second(store: JobStore, database: Database) -> None:
    job = await submit(store)
    held = await claim_one(store)
    for done in range(1, 5):
        await store.heartbeat([held], LEASE_S, {job.id: JobProgress(done=done, total=20)})
    assert (await store.get(job.id, "ada")).progress == JobProgress(done=4, total=20)
    await pass_time(database, 1.0)
    await store.heartbeat([held], LEASE_S, {job.id: JobProgress(done=5, total=20)})
    await pass_time(database, 1.0)
    await store.heartbeat([held], LEASE_S, {job.id: JobProgress(done=5, total=20)})
    told = [event.data["done"] for event in await store.events(job.id, "ada") if event.kind == "progress"]
    assert told[0] == 1
    assert told[-1] == 5
    assert len(told) < 5


async def test_progress_is_told_also_after_the_clock_was_set_back(store: JobStore, database: Database) -> None:
    job = await submit(store)
    held = await claim_one(store)
    await store.heartbeat([held], LEASE_S, {job.id: JobProgress(done=1, total=20)})
    await pass_time(database, -3600.0)
    await store.heartbeat([held], LEASE_S, {job.id: JobProgress(done=2, total=20)})
    told = [event.data["done"] for event in await store.events(job.id, "ada") if event.kind == "progress"]
    assert told == [1, 2]


async def test_a_new_attempt_starts_without_the_outputs_of_the_last(store: JobStore) -> None:
    await submit(store)
    held = await claim_one(store)
    await store.output(held, {"key": "a"})
    assert (await store.output(held, {"key": "b"})).outputs == ({"key": "a"}, {"key": "b"})
    await store.release(held)
    assert (await claim_one(store)).job.outputs == ()


async def test_pruning_takes_the_data_first_and_then_the_job(store: JobStore, database: Database) -> None:
    done = await submit(store)
    await store.succeed(await claim_one(store), {"images": ["a"]})
    waiting = await submit(store)
    assert await store.prune(keep_s=100.0, forget_s=1000.0) == 0
    await pass_time(database, 500.0)
    assert await store.prune(keep_s=100.0, forget_s=1000.0) == 1
    stripped = await store.get(done.id, "ada")
    assert (stripped.state, stripped.data_removed) == (State.SUCCEEDED, True)
    assert (stripped.request, stripped.result, stripped.outputs) == ({}, None, ())
    assert await store.events(done.id, "ada") == ()
    await pass_time(database, 1000.0)
    assert await store.prune(keep_s=100.0, forget_s=1000.0) == 1
    with pytest.raises(NotFound):
        await store.get(done.id, "ada")
    assert (await store.get(waiting.id, "ada")).request == waiting.request


async def test_pruning_does_a_bounded_part_at_a_time(store: JobStore, database: Database) -> None:
    for _ in range(5):
        await store.cancel((await submit(store)).id, "ada")
    await pass_time(database, 500.0)
    assert [await store.prune(100.0, 1000.0, limit=2) for _ in range(4)] == [2, 2, 1, 0]


async def test_pruning_goes_on_while_there_is_more_of_any_kind(
    store: JobStore, outbox: Outbox, database: Database
) -> None:
    """Of each job two deliveries: they outlast the jobs, and are pruned all the same."""
    for _ in range(5):
        await submit(store, webhook=HOOK)
        await store.succeed(await claim_one(store), {})
    for _ in range(5):
        for delivery in await outbox.claim_due(4, 60.0):
            await outbox.delivered(delivery, 200)
    assert [await store.prune(-1.0, -1.0, limit=2) for _ in range(6)] == [2, 2, 2, 2, 2, 0]
    left = await database.read(lambda c: c.scalar(select(func.count()).select_from(deliveries)))
    assert (left, (await store.list(None)).jobs) == (0, ())


async def test_a_job_without_its_request_is_not_tried_again(store: JobStore, database: Database) -> None:
    job = await submit(store)
    await store.cancel(job.id, "ada")
    await pass_time(database, 500.0)
    await store.prune(100.0, 1000.0)
    with pytest.raises(InvalidRequest, match="removed"):
        await store.retry(job.id, "ada")
