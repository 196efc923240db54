"""Webhooks from the real outbox to real receivers."""

import asyncio
import json
import time

from standardwebhooks.webhooks import Webhook as Verifier

from app.fetch import Fetcher
from app.jobs.job import Webhook
from app.jobs.outbox import Outbox
from app.jobs.store import JobStore
from app.settings import FetchSettings
from app.webhooks.deliverer import Deliverer
from tests.app.jobs.making import submit
from tests.app.loopback import Loopback, always, never, serving


def deliverer(outbox: Outbox, *receivers: Loopback) -> Deliverer:
    ports = tuple(receiver.port for receiver in receivers)
    return Deliverer(outbox, Fetcher(FetchSettings(ports=ports, allowed=("127.0.0.1",))))


async def finished(store: JobStore, url: str, count: int = 1) -> None:
    """Jobs that have ended and say so."""
    for _ in range(count):
        job = await submit(store, webhook=Webhook(url=url))
        await store.cancel(job.id, "ada")


async def arrived(receiver: Loopback, count: int) -> None:
    async with asyncio.timeout(60):
        while len(receiver.requests) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_webhook_goes_from_the_job_to_its_receiver(store: JobStore, outbox: Outbox):
    old = await outbox.secret("ada")
    new = await outbox.rotate("ada")
    async with serving(always(204)) as receiver:
        await finished(store, receiver.url("/hook"))
        delivering = deliverer(outbox, receiver)
        running = asyncio.create_task(delivering.run())
        await arrived(receiver, 1)
        delivering.stop()
        await asyncio.wait_for(running, 20)
    [request] = receiver.requests
    for secret in (old, new):
        assert Verifier(secret).verify(request.body, request.headers)["status"] == "cancelled"
    assert json.loads(request.body)["type"] == "job.completed"
    assert await outbox.claim_due(10, 60) == ()
    assert await outbox.dead("ada") == ()


async def test_gone_makes_dead_letters_of_what_comes_after(store: JobStore, outbox: Outbox):
    async with serving(always(410)) as receiver:
        await finished(store, receiver.url("/hook"))
        delivering = deliverer(outbox, receiver)
        running = asyncio.create_task(delivering.run())
        await arrived(receiver, 1)
        delivering.stop()
        await asyncio.wait_for(running, 20)
        await finished(store, receiver.url("/hook"))
    assert len(await outbox.dead("ada")) == 2
    assert len(receiver.requests) == 1


async def test_a_silent_receiver_with_a_url_for_each_job_holds_up_nobody(store: JobStore, outbox: Outbox):
    async with serving(never) as silent, serving(always()) as good:
        for n in range(100):
            await finished(store, silent.url(f"/?job={n}"))
        await finished(store, good.url("/"), 10)
        delivering = deliverer(outbox, silent, good)
        started = time.monotonic()
        running = asyncio.create_task(delivering.run())
        await arrived(good, 10)
        assert time.monotonic() - started < 10
        assert silent.connections <= 4
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
