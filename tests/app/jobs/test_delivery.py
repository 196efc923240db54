"""Webhooks from the real outbox to real receivers, whatever happens to who delivers them."""

import asyncio
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import update
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from app.database import Database
from app.fetch import Fetcher
from app.jobs.job import JobProgress, Webhook, WebhookEvent
from app.jobs.outbox import PER_ORIGIN, Outbox
from app.jobs.states import TERMINAL, State
from app.jobs.store import JobStore
from app.jobs.tables import deliveries
from app.settings import FetchSettings
from app.webhooks.deliverer import LEASE_S, Deliverer
from models.errors import InvalidRequest
from tests.app.jobs.making import ERROR, claim_one, pass_time, submit
from tests.app.loopback import Loopback, Request, always, never, response, serving, until

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import asyncio, sys
from app.database import Database
from app.fetch import Fetcher
from app.jobs.outbox import Outbox
from app.settings import FetchSettings
from app.webhooks.deliverer import Deliverer

async def main():
    settings = FetchSettings(ports=(int(sys.argv[2]),), allowed=("127.0.0.1",))
    await Deliverer(Outbox(Database(sys.argv[1])), Fetcher(settings)).run()

asyncio.run(main())
"""


def deliverer(outbox: Outbox, *receivers: Loopback) -> Deliverer:
    ports = tuple(receiver.port for receiver in receivers)
    return Deliverer(outbox, Fetcher(FetchSettings(ports=ports, allowed=("127.0.0.1",))))


@asynccontextmanager
async def delivering(outbox: Outbox, *receivers: Loopback) -> AsyncIterator[None]:
    delivering = deliverer(outbox, *receivers)
    running = asyncio.create_task(delivering.run())
    try:
        yield
    finally:
        delivering.stop()
        await asyncio.wait_for(running, 25)


async def finished(store: JobStore, url: str, count: int = 1) -> None:
    """Jobs that have ended and say so."""
    for _ in range(count):
        job = await submit(store, webhook=Webhook(url=url))
        await store.cancel(job.id, "ada")


async def arrived(receiver: Loopback, count: int) -> None:
    await until(lambda: len(receiver.requests) >= count, 60.0)


async def hurry(database: Database) -> None:
    """Everything pending is due: leases have run out, and pauses are over."""
    await database.write(lambda c: c.execute(update(deliveries).values(next_at=0.0)))


async def ended(state: State, store: JobStore, database: Database, webhook: Webhook) -> str:
    """The id of a job that was brought to this end by a runner."""
    job = await submit(store, webhook=webhook, deadline_s=50.0)
    held = await claim_one(store)
    match state:
        case State.SUCCEEDED:
            await store.succeed(held, {"images": []})
        case State.FAILED:
            await store.fail(held, ERROR, retry=False)
        case State.CANCELLED:
            await store.cancel(job.id, "ada")
            await store.cancelled(held)
        case State.EXPIRED:
            await pass_time(database, 60.0)
            await store.reap()
    return job.id


async def test_each_end_of_a_job_arrives_once_and_can_be_verified(
    store: JobStore, outbox: Outbox, database: Database
) -> None:
    secret = await outbox.secret("ada")
    async with serving(always(204)) as receiver:
        hook = Webhook(url=receiver.url("/hook"))
        ends = {await ended(state, store, database, hook): state for state in sorted(TERMINAL)}
        async with delivering(outbox, receiver):
            await arrived(receiver, len(ends))
            await asyncio.sleep(0.3)
    told = [Verifier(secret).verify(request.body, request.headers) for request in receiver.requests]
    assert {body["job_id"]: body["status"] for body in told} == ends
    assert len(told) == len(ends) == 4
    assert {body["type"] for body in told} == {"job.completed"}
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 4
    await hurry(database)
    assert await outbox.claim_due(10, 60) == ()
    assert await outbox.dead("ada") == ()


@pytest.mark.parametrize("wanted", [("start",), ("output", "completed"), ("start", "output", "logs", "completed")])
async def test_only_the_events_that_were_asked_for_arrive(
    wanted: tuple[WebhookEvent, ...], store: JobStore, outbox: Outbox, database: Database
) -> None:
    async with serving(always()) as receiver:
        job = await submit(store, webhook=Webhook(url=receiver.url(), events=wanted))
        held = await claim_one(store)
        await store.heartbeat([held], 30.0, {job.id: JobProgress(done=1, total=2)})
        await pass_time(database, 1.0)
        await store.output(held, {"key": "a"})
        await store.succeed(held, {"images": []})
        async with delivering(outbox, receiver):
            await arrived(receiver, len(wanted))
            await asyncio.sleep(0.3)
    assert Counter(json.loads(request.body)["type"] for request in receiver.requests) == {
        f"job.{event}": 1 for event in wanted
    }


async def test_every_attempt_has_the_same_id_and_body(store: JobStore, outbox: Outbox, database: Database) -> None:
    async def at_the_third(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(response(503 if len(receiver.requests) < 3 else 200))

    async with serving(at_the_third) as receiver:
        await finished(store, receiver.url())
        async with delivering(outbox, receiver):
            for count in (1, 2):
                await arrived(receiver, count)
                await asyncio.sleep(0.3)
                await hurry(database)
            await arrived(receiver, 3)
    assert len({(request.headers["webhook-id"], request.body) for request in receiver.requests}) == 1
    await hurry(database)
    assert await outbox.claim_due(10, 60) == ()


async def test_what_a_killed_deliverer_had_claimed_is_sent_again_with_the_same_id(
    url: str, store: JobStore, outbox: Outbox, database: Database
) -> None:
    """A process that is killed (SIGKILL) after the receiver has the request and before it has answered."""

    async def after_the_first(request: Request, writer: asyncio.StreamWriter) -> None:
        await never(request, writer) if len(receiver.requests) == 1 else writer.write(response())

    async with serving(after_the_first) as receiver:
        await finished(store, receiver.url())
        command = (sys.executable, "-c", PROGRAM, url, str(receiver.port))
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
        await arrived(receiver, 1)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        async with delivering(outbox, receiver):
            await asyncio.sleep(1.5)
            assert len(receiver.requests) == 1  # its lease runs on
            await hurry(database)
            await arrived(receiver, 2)
    first, second = receiver.requests
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)
    assert await outbox.dead("ada") == ()


async def test_several_deliverers_share_the_work_and_send_nothing_twice(
    url: str, store: JobStore, outbox: Outbox
) -> None:
    open_now: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def slowly(request: Request, writer: asyncio.StreamWriter) -> None:
        id = request.headers["webhook-id"]
        open_now[id] += 1
        most[id] = max(most[id], open_now[id])
        await asyncio.sleep(0.05)
        open_now[id] -= 1
        writer.write(response())

    databases = [Database(url) for _ in range(3)]
    async with serving(slowly) as first, serving(slowly) as second:
        await finished(store, first.url(), 30)
        await finished(store, second.url(), 30)
        working = [deliverer(Outbox(database), first, second) for database in databases]
        running = [asyncio.create_task(one.run()) for one in working]
        await until(lambda: len(most) == 60, 60.0)
        for one in working:
            one.stop()
        await asyncio.gather(*running)
        assert len(first.requests) + len(second.requests) == 60
    assert max(most.values()) == 1
    for database in databases:
        await database.close()


async def test_a_report_that_comes_after_another_attempt_began_says_nothing(
    store: JobStore, outbox: Outbox, database: Database
) -> None:
    await finished(store, "https://example.com/")
    (stale,) = await outbox.claim_due(1, LEASE_S)
    await hurry(database)
    (present,) = await outbox.claim_due(1, LEASE_S)
    await outbox.failed(stale, None, "too late", 0.0)
    assert await outbox.claim_due(1, LEASE_S) == ()
    await outbox.failed(stale, None, "too late", None)
    assert await outbox.dead("ada") == ()
    await outbox.failed(present, 500, "now", None)
    assert [letter.error for letter in await outbox.dead("ada")] == ["now"]


@pytest.mark.parametrize("where", ["", "/hook"], ids=["of all", "of one address"])
async def test_while_a_secret_is_replaced_either_verifies(where: str, store: JobStore, outbox: Outbox) -> None:
    """Also the first secret that an address has of its own replaces one: the owner's, which signed before."""
    async with serving(always()) as receiver:
        place = receiver.url(where) if where else ""
        old = await outbox.secret("ada", place)
        new = await outbox.rotate("ada", place, overlap_s=3600.0)
        await finished(store, receiver.url("/hook"))
        async with delivering(outbox, receiver):
            await arrived(receiver, 1)
            newest = await outbox.rotate("ada", place, overlap_s=0.0)
            await finished(store, receiver.url("/hook"))
            await arrived(receiver, 2)
    during, after = receiver.requests
    for secret in (old, new):
        assert Verifier(secret).verify(during.body, during.headers)["status"] == "cancelled"
        with pytest.raises(WebhookVerificationError):
            Verifier(secret).verify(after.body, after.headers)
    Verifier(newest).verify(after.body, after.headers)
    assert await outbox.secret("bob") not in (old, new, newest)


async def test_gone_disables_an_address_until_its_owner_enables_it(store: JobStore, outbox: Outbox) -> None:
    async def gone_at_first(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(response(410 if len(receiver.requests) == 1 else 200))

    async with serving(gone_at_first) as receiver:
        hook = receiver.url("/hook")
        await finished(store, hook)
        async with delivering(outbox, receiver):
            await arrived(receiver, 1)
            await asyncio.sleep(0.3)
            await finished(store, hook)
            met, unsent = await outbox.dead("ada")
            assert (met.status, met.attempts) == (410, 1)
            assert (unsent.status, unsent.attempts, unsent.error) == (None, 0, "the endpoint is disabled")
            with pytest.raises(InvalidRequest, match="enable it first"):
                await outbox.replay(met.id, "ada")
            assert len(receiver.requests) == 1
            await outbox.enable("ada", hook)
            await finished(store, hook)
            await outbox.replay(met.id, "ada")
            await arrived(receiver, 3)
            await asyncio.sleep(0.3)
    assert [letter.id for letter in await outbox.dead("ada")] == [unsent.id]
    assert Counter(request.headers["webhook-id"] for request in receiver.requests)[met.id] == 2


async def test_a_silent_receiver_with_a_url_for_each_job_holds_up_nobody(store: JobStore, outbox: Outbox) -> None:
    async with serving(never) as silent, serving(always()) as good:
        for n in range(100):
            await finished(store, silent.url(f"/?job={n}"))
        await finished(store, good.url("/"), 10)
        delivering = deliverer(outbox, silent, good)
        started = time.monotonic()
        running = asyncio.create_task(delivering.run())
        await arrived(good, 10)
        assert time.monotonic() - started < 10
        assert silent.connections <= PER_ORIGIN
        delivering.stop(drain_s=0.0)
        await running


async def test_nothing_is_claimed_that_would_have_to_wait(store: JobStore, outbox: Outbox) -> None:
    """Of one host, however it is written, as many as may be under way; of others as many as there are places."""
    for n in range(PER_ORIGIN + 2):
        await finished(store, f"https://{'SLOW' if n % 2 else 'slow'}.example.com/?job={n}")
    for n in range(3):
        await finished(store, f"https://slow.example.com.quick{n}.example.com/")
    claimed = await outbox.claim_due(64, LEASE_S)
    assert Counter(delivery.origin for delivery in claimed) == {
        "https://slow.example.com": PER_ORIGIN,
        **{f"https://slow.example.com.quick{n}.example.com": 1 for n in range(3)},
    }
    full, three = {"https://slow.example.com": PER_ORIGIN}, {"https://slow.example.com": PER_ORIGIN - 1}
    assert await outbox.claim_due(64, LEASE_S, full) == ()
    (one,) = await outbox.claim_due(64, LEASE_S, three)
    assert one.origin == "https://slow.example.com"
    assert await outbox.claim_due(1, LEASE_S, {"https://slow.example.com:443": PER_ORIGIN}) != ()
