"""Webhooks: written with the change they tell of, given out for a time, delivered or dead."""

import asyncio
import base64
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from sqlalchemy import insert, select, update

from app.database import Database
from app.jobs.endpoints import LONGEST_OVERLAP_S, PER_OWNER, SECRETS, URL_CHARACTERS
from app.jobs.job import Job, JobProgress, Stale, Webhook, WebhookEvent
from app.jobs.journal import BODY_BYTES
from app.jobs.outbox import PER_ORIGIN, Delivery, Outbox
from app.jobs.states import State
from app.jobs.store import JobStore
from app.jobs.tables import deliveries, endpoints
from models.errors import InvalidRequest, NotFound
from tests.app.jobs.making import ERROR, HOOK, LEASE_S, claim_one, pass_time, submit


async def wait(database: Database, seconds: float) -> None:
    changes = {"next_at": deliveries.c.next_at - seconds}
    await database.write(lambda c: c.execute(update(deliveries).values(changes)))


async def due(outbox: Outbox, limit: int = 10) -> list[Delivery]:
    return list(await outbox.claim_due(limit, LEASE_S))


async def finish(store: JobStore, webhook: Webhook = HOOK, owner: str = "ada") -> Job:
    await submit(store, owner, webhook=webhook)
    return await store.succeed(await claim_one(store), {"images": [{"key": "a"}]})


async def test_each_event_that_is_wanted_is_sent(store: JobStore, outbox: Outbox, database: Database) -> None:
    job = await submit(store, webhook=HOOK)
    held = await claim_one(store)
    await store.heartbeat([held], LEASE_S, {job.id: JobProgress(done=1, total=2)})
    await pass_time(database, 1.0)
    await store.output(held, {"key": "a"})
    await store.succeed(held, {"images": [{"key": "a"}]})
    found = [*await due(outbox), *await due(outbox)]
    assert {delivery.event for delivery in found} == {"start", "logs", "output", "completed"}
    bodies = {delivery.event: orjson.loads(delivery.body) for delivery in found}
    assert {event: body["status"] for event, body in bodies.items()} == {
        "start": "running",
        "logs": "running",
        "output": "running",
        "completed": "succeeded",
    }
    assert {body["job_id"] for body in bodies.values()} == {job.id}
    assert bodies["completed"]["result"] == {"images": [{"key": "a"}]}
    assert bodies["output"]["outputs"] == [{"key": "a"}]
    assert len({delivery.id for delivery in found}) == 4


async def test_an_event_that_is_not_wanted_is_not_sent(store: JobStore, outbox: Outbox) -> None:
    await finish(store, Webhook(url="https://example.com/a"))
    assert [delivery.event for delivery in await due(outbox)] == ["completed"]
    await submit(store)
    await store.succeed(await claim_one(store), {})
    assert await due(outbox) == []


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED])
async def test_every_end_is_sent_exactly_once(
    state: State, store: JobStore, outbox: Outbox, database: Database
) -> None:
    job = await submit(store, webhook=Webhook(url="https://example.com/a"), deadline_s=50.0)
    held = await claim_one(store)
    match state:
        case State.SUCCEEDED:
            await store.succeed(held, {})
            await store.succeed(held, {})
        case State.FAILED:
            await store.fail(held, ERROR, retry=False)
        case State.CANCELLED:
            await store.cancel(job.id, "ada")
            await store.cancelled(held)
        case State.EXPIRED:
            await pass_time(database, 60.0)
            await store.reap()
    await store.cancel(job.id, "ada")
    await store.reap()
    assert [orjson.loads(delivery.body)["status"] for delivery in await due(outbox)] == [state]


async def test_a_change_that_is_refused_sends_nothing(store: JobStore, outbox: Outbox) -> None:
    await submit(store, webhook=Webhook(url="https://example.com/a"))
    held = await claim_one(store)
    await store.release(held)
    with pytest.raises(Stale):
        await store.succeed(held, {})
    assert await due(outbox) == []


async def test_a_second_attempt_does_not_start_twice(store: JobStore, outbox: Outbox) -> None:
    await submit(store, webhook=HOOK)
    await store.release(await claim_one(store))
    await claim_one(store)
    assert [delivery.event for delivery in await due(outbox)] == ["start"]


async def test_a_delivery_is_given_to_one_until_its_lease_ends(
    store: JobStore, outbox: Outbox, database: Database
) -> None:
    await finish(store, Webhook(url="https://example.com/a"))
    found = await asyncio.gather(*(due(outbox) for _ in range(4)))
    (first,) = [delivery for some in found for delivery in some]
    assert first.attempts == 1
    await wait(database, LEASE_S + 1)
    (second,) = await due(outbox)
    assert (second.id, second.body, second.attempts) == (first.id, first.body, 2)


async def test_what_is_delivered_is_not_sent_again(store: JobStore, outbox: Outbox, database: Database) -> None:
    await finish(store, Webhook(url="https://example.com/a"))
    (delivery,) = await due(outbox)
    await outbox.delivered(delivery, 204)
    await outbox.failed(delivery, 500, "too late to say so", 1.0)
    await wait(database, 3600.0)
    assert await due(outbox) == []
    assert await outbox.dead(None) == ()


async def test_a_failed_delivery_is_due_again_when_it_was_said(
    store: JobStore, outbox: Outbox, database: Database
) -> None:
    await finish(store, Webhook(url="https://example.com/a"))
    (delivery,) = await due(outbox)
    await outbox.failed(delivery, 503, "busy", 300.0)
    await wait(database, 299.0)
    assert await due(outbox) == []
    await wait(database, 2.0)
    assert [again.id for again in await due(outbox)] == [delivery.id]


async def test_a_dead_letter_is_listed_and_replayed(store: JobStore, outbox: Outbox) -> None:
    job = await finish(store, Webhook(url="https://example.com/a"))
    (delivery,) = await due(outbox)
    await outbox.failed(delivery, None, "no answer", None)
    assert await due(outbox) == []
    (letter,) = await outbox.dead("ada")
    assert (letter.id, letter.job_id, letter.status, letter.error) == (delivery.id, job.id, None, "no answer")
    assert await outbox.dead("bob") == ()
    assert await outbox.dead("ada", after=letter.id) == ()
    with pytest.raises(NotFound):
        await outbox.replay(letter.id, "bob")
    await outbox.replay(letter.id, "ada")
    (again,) = await due(outbox)
    assert (again.id, again.body, again.attempts) == (delivery.id, delivery.body, 1)
    with pytest.raises(NotFound):
        await outbox.replay(letter.id, "ada")
    with pytest.raises(InvalidRequest, match="1 to 200"):
        await outbox.dead("ada", limit=0)


async def test_a_disabled_endpoint_gets_nothing_and_nothing_is_lost(store: JobStore, outbox: Outbox) -> None:
    gone, other = Webhook(url="https://example.com/gone"), Webhook(url="https://example.com/other")
    for webhook in (gone, gone, other):
        await finish(store, webhook)
    first = next(delivery for delivery in await due(outbox) if delivery.url == gone.url)
    await outbox.disable(first, 410, "gone")
    await finish(store, gone)
    await finish(store, gone, "bob")
    assert [(delivery.owner, delivery.url) for delivery in await due(outbox)] == [("bob", gone.url)]
    letters = await outbox.dead("ada")
    assert len(letters) == 3
    with pytest.raises(NotFound):
        await outbox.enable("ada", other.url)
    await outbox.enable("ada", gone.url)
    for letter in letters:
        await outbox.replay(letter.id, "ada")
    assert len(await due(outbox)) == 3


async def test_a_disabled_address_is_forgotten_in_time_unless_it_has_secrets(
    store: JobStore, outbox: Outbox, database: Database
) -> None:
    bare, own = Webhook(url="https://example.com/bare"), Webhook(url="https://example.com/own")
    await outbox.rotate("ada", own.url)
    for webhook in (bare, own):
        await finish(store, webhook)
    for delivery in await due(outbox):
        await outbox.disable(delivery, 410, "gone")
    await store.prune(1000.0, 1000.0)
    assert await _addresses(database) == {"", bare.url, own.url}
    await store.prune(1000.0, -1.0)
    assert await _addresses(database) == {"", own.url}


async def test_an_address_that_is_enabled_again_counts_as_none(outbox: Outbox, store: JobStore, database: Database):
    gone = Webhook(url="https://example.com/gone")
    await finish(store, gone)
    (delivery,) = await due(outbox)
    await outbox.disable(delivery, 410, "gone")
    await outbox.enable("ada", gone.url)
    assert await _addresses(database) == {""}


async def _addresses(database: Database) -> set[str]:
    return set(await database.read(lambda c: c.scalars(select(endpoints.c.url))))


async def test_a_receiver_with_many_deliveries_does_not_take_all_the_places(store: JobStore, outbox: Outbox) -> None:
    for _ in range(PER_ORIGIN + 3):
        await finish(store, Webhook(url="https://slow.example.com"))
    await finish(store, Webhook(url="https://quick.example.com"))
    urls = [delivery.url for delivery in await due(outbox)]
    assert urls.count("https://slow.example.com") == PER_ORIGIN
    assert urls.count("https://quick.example.com") == 1


async def test_a_large_body_is_cut_down_to_what_leads_to_the_rest(database: Database, outbox: Outbox) -> None:
    def large(job: Job, event: WebhookEvent) -> Mapping[str, Any]:
        return {"job_id": job.id, "picture": "x" * BODY_BYTES}

    store = JobStore(database, payload=large)
    job = await finish(store, Webhook(url="https://example.com/a"))
    (delivery,) = await due(outbox)
    assert len(delivery.body) < 1000
    told = orjson.loads(delivery.body)
    assert told == {"type": "job.completed", "job_id": job.id, "status": "succeeded", "truncated": ["data"]}


async def test_an_owners_secret_signs_all_until_an_endpoint_has_its_own(store: JobStore, outbox: Outbox) -> None:
    await finish(store, Webhook(url="https://example.com/a"))
    (delivery,) = await due(outbox)
    (secret,) = delivery.secrets
    assert secret == await outbox.secret("ada")
    assert secret.startswith("whsec_")
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    assert await outbox.secret("bob") != secret
    own = await outbox.rotate("ada", "https://example.com/a")
    assert await outbox.secret("ada", "https://example.com/a") == own != secret
    assert await outbox.secret("ada", "https://example.com/b") == secret


async def test_rotated_secrets_sign_side_by_side_for_a_while(store: JobStore, outbox: Outbox) -> None:
    old = await outbox.secret("ada")
    new = await outbox.rotate("ada", overlap_s=3600.0)
    await finish(store, Webhook(url="https://example.com/a"))
    (delivery,) = await due(outbox)
    assert delivery.secrets == (new, old)
    newest = await outbox.rotate("ada", overlap_s=0.0)
    await finish(store, Webhook(url="https://example.com/b"))
    (delivery,) = await due(outbox)
    assert delivery.secrets == (newest,)


async def test_only_so_many_secrets_are_valid_at_once(outbox: Outbox) -> None:
    for _ in range(SECRETS):
        await outbox.rotate("ada")
    with pytest.raises(InvalidRequest, match=f"{SECRETS} secrets"):
        await outbox.rotate("ada")


@pytest.mark.parametrize("overlap_s", [-1.0, LONGEST_OVERLAP_S + 1, float("nan"), float("inf")])
async def test_an_overlap_out_of_range_is_refused(outbox: Outbox, overlap_s: float) -> None:
    with pytest.raises(InvalidRequest, match="from 0 to 2592000 seconds"):
        await outbox.rotate("ada", overlap_s=overlap_s)


@pytest.mark.parametrize("address", ["https://a/\0", "https://a/\n", "x" * (URL_CHARACTERS + 1)])
async def test_what_no_database_keeps_is_no_address(outbox: Outbox, address: str) -> None:
    for refused in (outbox.secret("ada", address), outbox.rotate("ada", address), outbox.enable("ada", address)):
        with pytest.raises(InvalidRequest, match="printable"):
            await refused


async def test_an_owner_has_only_so_many_secrets_of_addresses(outbox: Outbox, database: Database) -> None:
    rows = [{"owner": "ada", "url": f"https://example.com/{n}", "secrets": []} for n in range(PER_OWNER)]
    await database.write(lambda c: c.execute(insert(endpoints), rows))
    await outbox.rotate("ada", rows[0]["url"])
    with pytest.raises(InvalidRequest, match=f"more than {PER_OWNER}"):
        await outbox.rotate("ada", "https://example.com/another")
    await outbox.rotate("bob", "https://example.com/another")


@pytest.mark.parametrize("id", ["", "msg_1", "msg_\0", "x" * 100_000])
async def test_what_is_no_id_is_no_dead_letter(outbox: Outbox, id: str) -> None:
    with pytest.raises(NotFound):
        await outbox.replay(id, "ada")
    if id:
        with pytest.raises(InvalidRequest, match="cursor"):
            await outbox.dead("ada", id)


async def test_secrets_needed_at_once_are_made_once(outbox: Outbox) -> None:
    assert len(set(await asyncio.gather(*(outbox.secret("ada") for _ in range(6))))) == 1
