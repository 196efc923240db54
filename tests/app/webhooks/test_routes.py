"""What callers do about their webhooks over HTTP, and that others' are none of their business."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest
from fastapi import Depends, FastAPI
from standardwebhooks.webhooks import Webhook as Verifier

from app import ingress
from app.auth import Guard
from app.database import Database
from app.dialects.native import webhooks
from app.fetch import Fetcher
from app.jobs.job import Webhook
from app.jobs.outbox import Outbox
from app.jobs.store import JobStore
from app.keys.caller import Limits
from app.keys.registry import Keys
from app.service import Service
from app.settings import FetchSettings
from app.webhooks.deliverer import Deliverer
from models.errors import HeliographError
from tests.app.conftest import MemoryRouter
from tests.app.jobs.making import submit
from tests.app.loopback import always, serving, until

URL = "https://example.com/hook"


class Caller:
    """A client with a key, and the id under which it owns things."""

    def __init__(self, http: httpx2.AsyncClient, id: str):
        self.http, self.id = http, id


@pytest.fixture
async def callers(database: Database, outbox: Outbox) -> AsyncIterator[dict[str, Caller]]:
    """Ada and Bob with the scope `jobs`, and Eve without."""
    keys = Keys(database, b"p" * 32)
    app = FastAPI(dependencies=[Depends(Guard("keys", keys))])
    app.include_router(webhooks.routes(Service(MemoryRouter(), outbox=outbox)), prefix="/v1")
    app.add_exception_handler(HeliographError, ingress.answer_error)
    found = {}
    for name, scope in (("ada", "jobs"), ("bob", "jobs"), ("eve", "generate")):
        key, text = await keys.create(name, (scope,), Limits())
        transport = httpx2.ASGITransport(app)
        http = httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers={"x-api-key": text})
        found[name] = Caller(http, key.caller)
    yield found
    for caller in found.values():
        await caller.http.aclose()


async def dead_letter(store: JobStore, outbox: Outbox, owner: str, url: str = URL) -> str:
    """The id of a webhook that nobody took."""
    job = await submit(store, owner, webhook=Webhook(url=url))
    await store.cancel(job.id, owner)
    (delivery,) = await outbox.claim_due(1, 60.0)
    await outbox.failed(delivery, 500, "the receiver did not take it", None)
    return delivery.id


async def test_a_dead_letter_is_listed_and_sent_again(
    callers: dict[str, Caller], store: JobStore, outbox: Outbox
) -> None:
    ada = callers["ada"]
    async with serving(always()) as receiver:
        id = await dead_letter(store, outbox, ada.id, receiver.url())
        listed = (await ada.http.get("/v1/webhooks/dead")).json()
        (letter,) = listed["dead"]
        assert (letter["id"], letter["url"], letter["event"]) == (id, receiver.url(), "completed")
        assert (letter["status"], letter["attempts"], listed["next"]) == (500, 1, None)
        assert "owner" not in letter
        answer = await ada.http.post(f"/v1/webhooks/dead/{id}/replay")
        assert (answer.status_code, answer.json()) == (202, {"id": id, "status": "pending"})
        deliverer = Deliverer(outbox, Fetcher(FetchSettings(ports=(receiver.port,), allowed=("127.0.0.1",))))
        running = asyncio.create_task(deliverer.run())
        await until(lambda: receiver.requests)
        deliverer.stop()
        await running
    assert [request.headers["webhook-id"] for request in receiver.requests] == [id]
    assert (await ada.http.get("/v1/webhooks/dead")).json()["dead"] == []
    assert (await ada.http.post(f"/v1/webhooks/dead/{id}/replay")).status_code == 404


async def test_anothers_dead_letter_is_one_that_never_was(
    callers: dict[str, Caller], store: JobStore, outbox: Outbox
) -> None:
    id = await dead_letter(store, outbox, callers["ada"].id)
    bob = callers["bob"].http
    assert (await bob.get("/v1/webhooks/dead")).json() == {"dead": [], "next": None}
    theirs = await bob.post(f"/v1/webhooks/dead/{id}/replay")
    unknown = f"msg_{'0' * 32}"
    nobodys = await bob.post(f"/v1/webhooks/dead/{unknown}/replay")
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.text.replace(id, unknown) == nobodys.text
    assert len(await outbox.dead(callers["ada"].id)) == 1


async def test_dead_letters_come_in_pages(callers: dict[str, Caller], store: JobStore, outbox: Outbox) -> None:
    ada = callers["ada"]
    ids = [await dead_letter(store, outbox, ada.id) for _ in range(5)]
    found, cursor = [], ""
    for _ in range(3):
        page = (await ada.http.get("/v1/webhooks/dead", params={"limit": 2, "cursor": cursor})).json()
        found += [letter["id"] for letter in page["dead"]]
        cursor = page["next"]
    assert (found, cursor) == (ids, None)


async def test_the_secret_is_ones_own_and_is_rotated(
    callers: dict[str, Caller], store: JobStore, outbox: Outbox
) -> None:
    ada, bob = callers["ada"], callers["bob"]
    answer = await ada.http.get("/v1/webhooks/secret")
    old = answer.json()["secret"]
    assert answer.headers["cache-control"] == "no-store"
    assert (await bob.http.get("/v1/webhooks/secret")).json()["secret"] != old
    rotated = (await ada.http.post("/v1/webhooks/rotate", json={"overlap_s": 60})).json()
    assert rotated == {"url": None, "secret": rotated["secret"], "overlap_s": 60}
    own = (await ada.http.post("/v1/webhooks/rotate", json={"url": URL})).json()["secret"]
    assert (await ada.http.get("/v1/webhooks/secret")).json() == {"url": None, "secret": rotated["secret"]}
    assert (await ada.http.get("/v1/webhooks/secret", params={"url": URL})).json() == {"url": URL, "secret": own}
    job = await submit(store, ada.id, webhook=Webhook(url=URL))
    await store.cancel(job.id, ada.id)
    (delivery,) = await outbox.claim_due(1, 60.0)
    assert delivery.secrets == (own, rotated["secret"], old)


async def test_an_address_that_was_disabled_is_enabled_by_its_owner_alone(
    callers: dict[str, Caller], store: JobStore, outbox: Outbox
) -> None:
    ada, bob = callers["ada"], callers["bob"]
    job = await submit(store, ada.id, webhook=Webhook(url=URL))
    await store.cancel(job.id, ada.id)
    (delivery,) = await outbox.claim_due(1, 60.0)
    await outbox.disable(delivery, 410, "gone")
    refused = await ada.http.post(f"/v1/webhooks/dead/{delivery.id}/replay")
    assert refused.status_code == 422
    assert refused.json()["error"]["field"] == "id"
    assert (await bob.http.post("/v1/webhooks/enable", json={"url": URL})).status_code == 404
    assert (await ada.http.post("/v1/webhooks/enable", json={"url": URL})).json() == {"url": URL, "enabled": True}
    assert (await ada.http.post("/v1/webhooks/enable", json={"url": URL})).status_code == 404
    assert (await ada.http.post(f"/v1/webhooks/dead/{delivery.id}/replay")).status_code == 202


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("GET", "/v1/webhooks/dead?limit=0", None, "limit"),
        ("GET", "/v1/webhooks/dead?limit=many", None, "limit"),
        ("GET", "/v1/webhooks/dead?cursor=%00", None, "cursor"),
        ("GET", "/v1/webhooks/dead?page=2", None, "page"),
        ("GET", "/v1/webhooks/secret?url=%00", None, "url"),
        ("POST", "/v1/webhooks/rotate", {"overlap_s": -1}, "overlap_s"),
        ("POST", "/v1/webhooks/rotate", {"overlap_s": "60"}, "overlap_s"),
        ("POST", "/v1/webhooks/rotate", {"overlap": 60}, "overlap"),
        ("POST", "/v1/webhooks/rotate", {"url": "x\0"}, "url"),
        ("POST", "/v1/webhooks/enable", {}, "url"),
    ],
)
async def test_a_mistake_is_told_with_its_field(
    callers: dict[str, Caller], method: str, path: str, body: object, field: str
) -> None:
    answer = await callers["ada"].http.request(method, path, json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["field"] == field


async def test_what_is_no_id_is_not_found(callers: dict[str, Caller]) -> None:
    for id in ("%00", "x" * 4000, "%ed%a0%80", "msg_1"):
        assert (await callers["ada"].http.post(f"/v1/webhooks/dead/{id}/replay")).status_code == 404


async def test_every_path_wants_the_scope_jobs(callers: dict[str, Caller]) -> None:
    paths = [("GET", "secret"), ("GET", "dead"), ("POST", "rotate"), ("POST", "enable"), ("POST", "dead/a/replay")]
    for method, path in paths:
        assert (await callers["eve"].http.request(method, f"/v1/webhooks/{path}")).status_code == 403


async def test_secrets_are_fit_for_the_standards_library(callers: dict[str, Caller]) -> None:
    Verifier((await callers["ada"].http.get("/v1/webhooks/secret")).json()["secret"])
