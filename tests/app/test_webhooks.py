"""Webhooks: signed so that the standard's own library agrees, and delivered to real receivers, good and bad."""

import asyncio
import base64
import json
import re
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trustme
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from app.fetch import Fetcher
from app.jobs.outbox import PER_ORIGIN, Delivery, Outbox
from app.settings import FetchSettings
from app.webhooks import signing
from app.webhooks.deliverer import AT_ONCE, ATTEMPTS, DELAYS_S, Deliverer, retry_in_s
from models.errors import HeliographError, InvalidRequest
from tests.app.loopback import Answer, Loopback, Request, always, never, response, serving, until

BODY = b'{"id":"job1","status":"succeeded"}'
OLD, NEW = ("whsec_" + base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))


@dataclass
class MemoryOutbox(Outbox):
    """Deliveries in memory, leased as the database leases them; `away` makes it fail."""

    pending: dict[str, Delivery] = field(default_factory=dict)
    due: dict[str, float] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    dead: dict[str, tuple[int | None, str]] = field(default_factory=dict)
    failures: list[tuple[str, int | None, str, float | None]] = field(default_factory=list)
    disabled: list[str] = field(default_factory=list)
    away: bool = False

    def add(self, url: str, id: str = "msg_1", secrets: tuple[str, ...] = (NEW,), attempts: int = 0) -> None:
        whose = {"job_id": "job1", "owner": "ada", "event": "completed"}
        self.pending[id] = Delivery(id=id, url=url, body=BODY, secrets=secrets, attempts=attempts, **whose)
        self.due[id] = 0.0

    async def claim_due(
        self, limit: int, lease_s: float, under_way: Mapping[str, int] | None = None
    ) -> tuple[Delivery, ...]:
        await self._answer()
        now, taken, claimed = time.monotonic(), Counter(under_way), []
        for delivery in sorted(self.pending.values(), key=lambda d: self.due[d.id]):
            free = len(claimed) < limit and taken[delivery.origin] < PER_ORIGIN
            if self.due[delivery.id] <= now and free:
                taken[delivery.origin] += 1
                claimed.append(replace(delivery, attempts=delivery.attempts + 1))
        self.due |= {delivery.id: now + lease_s for delivery in claimed}
        self.pending |= {delivery.id: delivery for delivery in claimed}
        return tuple(claimed)

    async def delivered(self, delivery: Delivery, status: int) -> None:
        await self._answer()
        assert status in range(200, 300)
        self.taken.add(delivery.id)
        del self.pending[delivery.id]

    async def failed(self, delivery: Delivery, status: int | None, error: str, retry_in_s: float | None) -> None:
        await self._answer()
        self.failures.append((delivery.id, status, error, retry_in_s))
        if retry_in_s is None:
            self.dead[delivery.id] = (status, error)
            del self.pending[delivery.id]
            return
        self.due[delivery.id] = time.monotonic() + retry_in_s

    async def disable(self, delivery: Delivery, status: int, error: str) -> None:
        await self._answer()
        assert (status, bool(error)) == (410, True)
        self.disabled.append(self.pending.pop(delivery.id).url)

    async def _answer(self) -> None:
        await asyncio.sleep(0)
        if self.away:
            raise HeliographError("the database is away")

    def hurry(self) -> None:
        """Everything that waits is due now."""
        self.due |= dict.fromkeys(self.pending, 0.0)


@asynccontextmanager
async def delivering(
    outbox: MemoryOutbox, *receivers: Loopback, tls: ssl.SSLContext | None = None
) -> AsyncIterator[None]:
    ports = tuple(receiver.port for receiver in receivers) or (80,)
    deliverer = Deliverer(outbox, Fetcher(FetchSettings(ports=ports, allowed=("127.0.0.0/8", "localhost")), tls=tls))
    running = asyncio.create_task(deliverer.run())
    try:
        yield
    finally:
        deliverer.stop()
        await asyncio.wait_for(running, 25)


# Signing


@pytest.mark.parametrize("secrets", [(NEW,), (NEW, OLD), (OLD, NEW)])
def test_the_standards_library_verifies_it(secrets: tuple[str, ...]):
    headers = signing.headers("msg_1", int(time.time()), BODY, secrets)
    assert len(headers["webhook-signature"].split(" ")) == len(secrets)
    for secret in secrets:
        assert Webhook(secret).verify(BODY, headers) == json.loads(BODY)


def test_the_standards_library_signs_alike():
    from datetime import UTC, datetime

    now = datetime.now(UTC).replace(microsecond=0)
    ours = signing.headers("msg_1", int(now.timestamp()), BODY, (NEW,))["webhook-signature"]
    assert ours == Webhook(NEW).sign("msg_1", now, BODY.decode())


@pytest.mark.parametrize(
    "tampered",
    [
        {"body": BODY + b" "},
        {"webhook-id": "msg_2"},
        {"webhook-timestamp": str(int(time.time()) - 1)},
        {"secret": OLD},
    ],
)
def test_what_was_tampered_with_is_not_verified(tampered: dict):
    headers = signing.headers("msg_1", int(time.time()), BODY, (NEW,))
    headers |= {name: value for name, value in tampered.items() if name in headers}
    with pytest.raises(WebhookVerificationError):
        Webhook(tampered.get("secret", NEW)).verify(tampered.get("body", BODY), headers)


def test_a_replayed_webhook_is_too_old():
    headers = signing.headers("msg_1", int(time.time()) - 3600, BODY, (NEW,))
    with pytest.raises(WebhookVerificationError, match="old"):
        Webhook(NEW).verify(BODY, headers)


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        "whsec_####",
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        "whsec_" + base64.b64encode(bytes(65)).decode(),
        base64.b64encode(bytes(32)).decode(),
    ],
)
def test_what_is_no_secret_is_refused_and_not_repeated(secret: str):
    with pytest.raises(InvalidRequest, match="24 to 64 bytes") as refused:
        signing.headers("msg_1", 0, BODY, (secret,))
    assert secret == "" or secret not in str(refused.value).replace("must be whsec_ and", "")


def test_nothing_is_sent_unsigned():
    with pytest.raises(InvalidRequest, match="unsigned"):
        signing.headers("msg_1", 0, BODY, ())


def test_the_page_for_receivers_shows_true_signatures():
    page = (Path(__file__).resolve().parents[2] / "docs" / "webhooks.md").read_text()
    told = dict(re.findall(r'^    "(webhook-[a-z]+)": "(.*)",$', page, flags=re.M))
    [secret], [body] = (
        re.findall(r'^secret = "(.*)"$', page, flags=re.M),
        re.findall(r"^body = b'(.*)'$", page, flags=re.M),
    )
    ours = signing.headers(told["webhook-id"], int(told["webhook-timestamp"]), body.encode(), (secret,))
    assert told["webhook-signature"].split(" ")[0] == ours["webhook-signature"]
    assert len(told["webhook-signature"].split(" ")) == 2


# When the next attempt is due


def test_ten_attempts_go_from_seconds_to_a_day_over_three_days():
    for attempts, delay in enumerate(DELAYS_S, start=1):
        delays = [retry_in_s(attempts) for _ in range(200)]
        assert all(found is not None and 0.9 * delay <= found <= 1.1 * delay for found in delays)
        assert len(set(delays)) > 100
    assert (DELAYS_S[0], DELAYS_S[-1]) == (5, 24 * 3600)
    assert 3 <= sum(DELAYS_S) / 86400 <= 3.5
    assert retry_in_s(len(DELAYS_S) + 1) is None


def test_a_receiver_may_ask_for_patience_up_to_a_day():
    assert retry_in_s(1, 600.0) == 600.0
    assert retry_in_s(1, 1e9) == 86400.0
    later = retry_in_s(3, 1.0)
    assert later is not None
    assert later >= 1600  # and it may not ask for haste
    assert retry_in_s(10, 600.0) is None


# Delivery


async def test_a_webhook_arrives_and_can_be_verified():
    async with serving(always(204)) as receiver:
        outbox = MemoryOutbox()
        outbox.add(receiver.url("/hook"), secrets=(NEW, OLD))
        async with delivering(outbox, receiver):
            await until(lambda: outbox.taken)
    [request] = receiver.requests
    assert (request.method, request.target, request.body) == ("POST", "/hook", BODY)
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == "msg_1"
    for secret in (NEW, OLD):
        assert Webhook(secret).verify(request.body, request.headers) == json.loads(BODY)


async def test_every_attempt_has_the_same_id_and_a_time_of_its_own():
    async def later(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(response(500 if len(receiver.requests) < 3 else 200))

    async with serving(later) as receiver:
        outbox = MemoryOutbox()
        outbox.add(receiver.url())
        async with delivering(outbox, receiver):
            for attempt in (1, 2):
                await until(lambda attempt=attempt: len(outbox.failures) == attempt)
                await asyncio.sleep(1.1)
                outbox.hurry()
            await until(lambda: outbox.taken)
    assert [request.headers["webhook-id"] for request in receiver.requests] == ["msg_1"] * 3
    assert len({request.headers["webhook-timestamp"] for request in receiver.requests}) == 3
    for request in receiver.requests:
        Webhook(NEW).verify(request.body, request.headers)


async def stalling_reply(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 500 No\r\ncontent-length: 1000000000\r\n\r\n")
    while True:
        writer.write(bytes(65536))
        await writer.drain()


async def hanging_up(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


# what the receiver does, the status that is noted, the least and the most seconds until the next attempt
FAILURES: dict[str, tuple[Answer, int | None, float, float]] = {
    "an error": (always(500), 500, 4.5, 5.5),
    "refused": (always(400), 400, 4.5, 5.5),
    "not found": (always(404), 404, 4.5, 5.5),
    "busy": (always(429, retry_after=120), 429, 120, 120),
    "down for maintenance": (always(503, retry_after=40), 503, 40, 40),
    "busy without a word": (always(429), 429, 4.5, 5.5),
    "an error that asks for patience": (always(500, retry_after=120), 500, 4.5, 5.5),
    "a redirect": (always(302, location="http://169.254.169.254/latest/meta-data/"), 302, 4.5, 5.5),
    "a redirect to itself": (always(308, location="/"), 308, 4.5, 5.5),
    "not modified": (always(304), 304, 4.5, 5.5),
    "a huge reply": (stalling_reply, 500, 4.5, 5.5),
    "hanging up": (hanging_up, None, 4.5, 5.5),
}


@pytest.mark.parametrize("kind", FAILURES)
async def test_a_failed_attempt_is_noted_and_comes_again(kind: str):
    answer, status, least, most = FAILURES[kind]
    async with serving(answer) as receiver:
        outbox = MemoryOutbox()
        outbox.add(receiver.url())
        async with delivering(outbox, receiver):
            await until(lambda: outbox.failures)
    [(id, noted, error, retry)] = outbox.failures
    assert (id, noted) == ("msg_1", status)
    assert error
    assert retry is not None
    assert least <= retry <= most
    assert len(receiver.requests) == 1


async def test_after_the_last_attempt_it_is_dead():
    async with serving(always(500)) as receiver:
        outbox = MemoryOutbox()
        outbox.add(receiver.url(), attempts=len(DELAYS_S))
        async with delivering(outbox, receiver):
            await until(lambda: outbox.dead)
    assert outbox.dead["msg_1"][0] == 500


async def test_gone_disables_the_address():
    async with serving(always(410)) as receiver:
        outbox = MemoryOutbox()
        outbox.add(receiver.url("/hook"))
        async with delivering(outbox, receiver):
            await until(lambda: outbox.disabled)
    assert outbox.disabled == [receiver.url("/hook")]
    assert outbox.failures == []


async def test_a_receiver_that_is_down_is_tried_again():
    async with serving(always()) as gone:
        pass
    outbox = MemoryOutbox()
    outbox.add(gone.url())
    async with delivering(outbox, gone):
        await until(lambda: outbox.failures)
        async with delivering_at(gone.port) as receiver:
            outbox.hurry()
            await until(lambda: outbox.taken)
            assert len(receiver) == 1


@asynccontextmanager
async def delivering_at(port: int) -> AsyncIterator[list[bytes]]:
    """A receiver that is back on its port."""
    heard: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        await reader.readexactly(len(BODY))
        writer.write(response())
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", port)
    async with server:
        yield heard


async def test_bad_certificates_are_refused_and_good_ones_taken():
    authority = trustme.CA()
    served, trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(served)
    authority.configure_trust(trusted)
    async with serving(always(), tls=served) as receiver:
        outbox = MemoryOutbox()
        outbox.add(receiver.url(scheme="https", host="127.0.0.1"), "wrong_name")
        outbox.add(receiver.url(scheme="https", host="localhost"), "right_name")
        async with delivering(outbox, receiver, tls=trusted):
            await until(lambda: outbox.taken and outbox.failures)
        assert outbox.taken == {"right_name"}
        assert [failure[:2] for failure in outbox.failures] == [("wrong_name", None)]
        outbox.add(receiver.url(scheme="https", host="localhost"), "unknown_authority")
        async with delivering(outbox, receiver):
            await until(lambda: len(outbox.failures) == 2)
        assert len(receiver.requests) == 1


HOPELESS = {
    "a private address": ("http://10.0.0.1/", True),
    "a metadata address": ("http://169.254.169.254/latest/meta-data/", True),
    "another scheme": ("file:///etc/passwd", False),
    "another port": ("http://localhost:1/", False),
    "no address": ("http://[", False),
}


@pytest.mark.parametrize("kind", HOPELESS)
async def test_what_may_not_be_reached_is_not(kind: str):
    """An address is refused for good; what a name leads to may change."""
    url, again = HOPELESS[kind]
    outbox = MemoryOutbox()
    outbox.add(url)
    async with delivering(outbox):
        await until(lambda: outbox.failures)
    assert bool(outbox.dead) is not again


async def test_without_a_secret_it_is_dead_and_nobody_else_is_held_up():
    async with serving(always()) as receiver:
        outbox = MemoryOutbox()
        outbox.add(receiver.url(), "unsigned", secrets=())
        outbox.add(receiver.url(), "signed")
        async with delivering(outbox, receiver):
            await until(lambda: outbox.taken and outbox.dead)
    assert (outbox.taken, set(outbox.dead)) == ({"signed"}, {"unsigned"})
    assert [request.headers["webhook-id"] for request in receiver.requests] == ["signed"]


@pytest.mark.parametrize("slow", [never, stalling_reply], ids=["silent", "endless"])
async def test_slow_receivers_hold_up_nobody(slow: Answer):
    """Hundreds wait for receivers that never answer, and were there first; those to a good one arrive at once."""
    async with serving(slow) as first, serving(slow) as second, serving(always()) as good:
        outbox = MemoryOutbox()
        for n in range(150):
            outbox.add(first.url(f"/{n}"), f"first_{n}")
            outbox.add(second.url(f"/{n}"), f"second_{n}")
        for n in range(40):
            outbox.add(good.url(), f"good_{n}")
        started = time.monotonic()
        deliverer = Deliverer(
            outbox, Fetcher(FetchSettings(ports=(first.port, second.port, good.port), allowed=("127.0.0.1",)))
        )
        running = asyncio.create_task(deliverer.run())
        await until(lambda: len(outbox.taken) == 40)
        assert time.monotonic() - started < 5
        if slow is never:
            assert 0 < first.connections <= PER_ORIGIN
            assert 0 < second.connections <= PER_ORIGIN
        deliverer.stop(drain_s=0.0)
        await running


async def test_no_more_than_so_many_attempts_at_once():
    class Waiting:
        here = most = 0

        async def post(self, url, headers, body, timeout_s):
            self.here += 1
            self.most = max(self.most, self.here)
            await asyncio.sleep(600)

    outbox, waiting = MemoryOutbox(), Waiting()
    for n in range(200):
        outbox.add(f"https://host{n % 100}.test/", f"msg_{n}")
    deliverer = Deliverer(outbox, waiting)
    running = asyncio.create_task(deliverer.run())
    await until(lambda: waiting.here == AT_ONCE)
    await asyncio.sleep(0.3)
    assert waiting.most == AT_ONCE
    deliverer.stop(drain_s=0.0)
    await running


async def test_what_does_not_end_in_time_is_dropped_and_due_again_after_its_lease():
    async with serving(never) as receiver:
        outbox = MemoryOutbox()
        outbox.add(receiver.url())
        deliverer = Deliverer(outbox, Fetcher(FetchSettings(ports=(receiver.port,), allowed=("127.0.0.1",))))
        running = asyncio.create_task(deliverer.run())
        await until(lambda: receiver.requests)
        started = time.monotonic()
        deliverer.stop(drain_s=0.2)
        await running
        assert 0.2 <= time.monotonic() - started < 2
    assert (set(outbox.pending), outbox.failures) == ({"msg_1"}, [])
    assert outbox.due["msg_1"] > started


async def test_a_process_that_stood_still_after_a_claim_leaves_it_to_the_next():
    class Stalling(MemoryOutbox):
        async def claim_due(self, *args, **options):
            claimed = await super().claim_due(*args, **options)
            if claimed and claimed[0].attempts == 1:
                time.sleep(0.6)  # noqa: ASYNC251  (the whole process)
            return claimed

    async with serving(always()) as receiver:
        outbox = Stalling()
        outbox.add(receiver.url())
        fetcher = Fetcher(FetchSettings(ports=(receiver.port,), allowed=("127.0.0.1",)))
        deliverer = Deliverer(outbox, fetcher, timeout_s=0.5, lease_s=1.0)
        running = asyncio.create_task(deliverer.run())
        await asyncio.sleep(0.3)
        assert not receiver.requests
        await until(lambda: outbox.taken)
        deliverer.stop()
        await running
    assert len(receiver.requests) == 1


async def test_a_mistake_of_ours_ends_it_and_is_told():
    class Mistaken:
        async def post(self, url, headers, body, timeout_s):
            raise ZeroDivisionError

    outbox = MemoryOutbox()
    outbox.add("https://example.com/")
    with pytest.raises(ExceptionGroup) as told:
        await Deliverer(outbox, Mistaken()).run()
    assert told.group_contains(ZeroDivisionError)


async def test_attempts_of_which_nothing_is_ever_told_come_to_an_end():
    """A webhook that ends whatever process sends it is not sent for ever."""
    async with serving(always()) as receiver:
        outbox = MemoryOutbox()
        outbox.add(receiver.url(), attempts=ATTEMPTS)
        async with delivering(outbox, receiver):
            await until(lambda: outbox.dead)
    assert not receiver.requests


async def test_it_stops_once_what_is_under_way_has_ended():
    arrived = asyncio.Event()

    async def slow(_: Request, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await asyncio.sleep(0.5)
        writer.write(response())

    async with serving(slow) as receiver:
        outbox = MemoryOutbox()
        for n in range(20):
            outbox.add(receiver.url(), f"msg_{n}")
        async with delivering(outbox, receiver):
            await arrived.wait()
        assert len(outbox.taken) == PER_ORIGIN
        assert len(outbox.pending) == 20 - PER_ORIGIN


async def test_it_outlives_a_database_that_is_away():
    async with serving(always()) as receiver:
        outbox = MemoryOutbox(away=True)
        outbox.add(receiver.url())
        async with delivering(outbox, receiver):
            await asyncio.sleep(0.2)
            outbox.away = False
            await until(lambda: outbox.taken)


async def test_what_could_not_be_written_down_comes_again_after_its_lease():
    async def away_after_that(_: Request, writer: asyncio.StreamWriter) -> None:
        outbox.away = len(receiver.requests) == 1
        writer.write(response())

    async with serving(away_after_that) as receiver:
        outbox = MemoryOutbox()
        outbox.add(receiver.url())
        async with delivering(outbox, receiver):
            await until(lambda: receiver.requests)
            await asyncio.sleep(0.2)
            assert not outbox.taken
            outbox.away = False
            outbox.hurry()  # the lease has run out
            await until(lambda: outbox.taken)
    assert [request.headers["webhook-id"] for request in receiver.requests] == ["msg_1", "msg_1"]
