"""How jobs are accepted: idempotency keys row by row, the bound of the queue, a second try."""

import asyncio

import pytest

from app.database import Database
from app.jobs.job import Idempotency, Submission, Webhook, fingerprint
from app.jobs.states import State
from app.jobs.store import JobStore
from app.jobs.submission import Bounds
from models.errors import InvalidRequest, NotFound, Overloaded
from tests.app.jobs.making import ERROR, HOOK, brought_to, claim_one, new, pass_time, submit

BODY = {"prompt": "a red circle", "steps": 20}


def key(name: str = "k", body: object = BODY, route: str = "/v1/generate") -> Idempotency:
    return Idempotency(route=route, key=name, fingerprint=fingerprint(body))


async def count(store: JobStore) -> int:
    return len((await store.list(None)).jobs)


async def test_a_job_is_what_was_submitted(store: JobStore) -> None:
    wanted = new(priority=3, deadline_s=60.0, work=4.5, webhook=HOOK)
    submission = await store.submit(wanted)
    job = submission.job
    assert not submission.replayed
    assert job == await store.get(job.id, "ada")
    assert (job.owner, job.model, job.kind, job.request) == ("ada", "sd15", "generate", {"prompt": "a red circle"})
    assert (job.priority, job.work, job.webhook, job.state) == (3, 4.5, HOOK, State.QUEUED)
    assert job.deadline_at == job.created_at + 60.0
    assert (job.attempt, job.deaths, job.failures, job.finished) == (0, 0, 0, False)


async def test_the_same_key_and_body_give_the_same_job(store: JobStore) -> None:
    first = await store.submit(new(), key())
    second = await store.submit(new(), key(body=dict(reversed(BODY.items()))))
    assert second == Submission(first.job, replayed=True)
    assert await count(store) == 1


async def test_the_same_key_with_another_body_is_refused(store: JobStore) -> None:
    await store.submit(new(), key())
    with pytest.raises(InvalidRequest, match="another body") as refused:
        await store.submit(new(), key(body=BODY | {"steps": 21}))
    assert refused.value.field == "Idempotency-Key"
    assert await count(store) == 1


async def test_a_key_belongs_to_its_owner_and_its_route(store: JobStore) -> None:
    await store.submit(new("ada"), key())
    await store.submit(new("bob"), key())
    await store.submit(new("ada"), key(route="/v1/upscale"))
    assert await count(store) == 3


async def test_a_key_used_many_times_at_once_makes_one_job(store: JobStore) -> None:
    submissions = await asyncio.gather(*(store.submit(new(), key()) for _ in range(12)))
    assert len({submission.job.id for submission in submissions}) == 1
    assert sum(not submission.replayed for submission in submissions) == 1


async def test_a_failed_job_is_replayed_as_failed(store: JobStore) -> None:
    first = await store.submit(new(), key())
    await store.fail(await claim_one(store), ERROR, retry=False)
    replay = await store.submit(new(), key())
    assert (replay.job.id, replay.job.state, replay.job.error) == (first.job.id, State.FAILED, ERROR)


async def test_a_refused_submission_does_not_use_its_key_up(database: Database) -> None:
    store = JobStore(database, Bounds(waiting=1))
    blocking = await submit(store)
    with pytest.raises(Overloaded):
        await store.submit(new(), key())
    await store.cancel(blocking.id, "ada")
    assert not (await store.submit(new(), key())).replayed


async def test_a_replay_needs_no_room(database: Database) -> None:
    store = JobStore(database, Bounds(waiting=1))
    await store.submit(new(), key())
    assert (await store.submit(new(), key())).replayed


async def test_a_key_is_kept_as_long_as_the_result_and_no_longer(store: JobStore, database: Database) -> None:
    first = await store.submit(new(), key())
    await store.succeed(await claim_one(store), {"images": []})
    await pass_time(database, 1000.0)
    await store.prune(keep_s=100.0, forget_s=5000.0)
    assert (await store.submit(new(), key())).job.id == first.job.id
    await pass_time(database, 5000.0)
    await store.prune(keep_s=100.0, forget_s=5000.0)
    assert not (await store.submit(new(), key())).replayed


@pytest.mark.parametrize("name", ["", "x" * 256, "a\nb", "a\x00b"])
def test_a_key_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        key(name)
    assert refused.value.field == "Idempotency-Key"


def test_the_longest_key_is_taken() -> None:
    assert len(key("x" * 255).key) == 255


async def test_no_more_wait_than_may(database: Database) -> None:
    store = JobStore(database, Bounds(waiting=5, per_owner=5))
    results = await asyncio.gather(
        *(store.submit(new(f"owner-{i}", work=7.0)) for i in range(12)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, Overloaded)]
    assert len(refused) == 7
    assert {error.retry_after_s for error in refused} == {7.0}
    await claim_one(store)
    await submit(store)
    with pytest.raises(Overloaded, match="5 jobs wait already"):
        await submit(store)


async def test_no_owner_takes_all_the_room(database: Database) -> None:
    store = JobStore(database, Bounds(waiting=10, per_owner=2))
    for _ in range(2):
        await submit(store, "ada")
    with pytest.raises(Overloaded, match="2 jobs of this caller wait already"):
        await submit(store, "ada")
    await submit(store, "bob")


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED, State.EXPIRED])
async def test_a_second_try_is_another_job(state: State, store: JobStore, database: Database) -> None:
    first = await brought_to(state, store, database)
    before = await store.get(first.id, "ada")
    second = (await store.retry(first.id, "ada", key("again"))).job
    assert (second.state, second.retry_of, second.attempt) == (State.QUEUED, first.id, 0)
    assert (second.request, second.model, second.webhook) == (before.request, before.model, before.webhook)
    assert await store.get(first.id, "ada") == before
    assert (await store.retry(first.id, "ada", key("again"))).job == second
    if state is State.EXPIRED:
        assert second.deadline_at == pytest.approx(second.created_at + 100.0)


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.CANCELLING, State.SUCCEEDED])
async def test_what_did_not_go_wrong_is_not_tried_again(state: State, store: JobStore, database: Database) -> None:
    held = await brought_to(state, store, database)
    with pytest.raises(InvalidRequest, match=state):
        await store.retry(held.id, "ada")


async def test_anothers_job_is_like_none(store: JobStore) -> None:
    job = await submit(store, "ada")
    for ask in (store.get, store.cancel, store.retry, store.position, store.events):
        with pytest.raises(NotFound):
            await ask(job.id, "bob")
        with pytest.raises(NotFound):
            await ask("0" * 32, "ada")
        with pytest.raises(NotFound):
            await ask("../nonsense\x00", "ada")
    assert (await store.get(job.id, None)).state is State.QUEUED


def test_a_webhook_wants_known_events() -> None:
    with pytest.raises(InvalidRequest, match="start, output, logs, completed"):
        Webhook(url="https://example.com", events=("done",))  # pyright: ignore[reportArgumentType]
