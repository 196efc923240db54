"""Jobs through the whole gateway: real SQLite, a real folder and a real runner, over a router in memory."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import update
from standardwebhooks.webhooks import Webhook as Verifier
from starlette.requests import Request

from app import ingress, stores
from app.auth import Guard
from app.database import Database
from app.dialects.native import GenerateBody, payload, submission
from app.dialects.native.jobs import _events
from app.errors import envelope, status_of
from app.fetch import Fetcher
from app.job_runner import drawing
from app.jobs import failures, tables
from app.jobs.job import JobEvent, NewJob
from app.jobs.making import Maker
from app.jobs.outbox import Outbox
from app.jobs.runner import Pace, Runner
from app.jobs.service import Jobs
from app.jobs.store import Bounds, JobStore
from app.keys.budgets import Budgets
from app.keys.caller import Limits
from app.keys.registry import Keys
from app.metered import Metered
from app.results import results
from app.secret import derive, read_or_make
from app.service import Service
from app.settings import FetchSettings, FolderSettings, GatewaySettings, QueueSettings
from app.stores.store import StorageFull
from app.webhooks.deliverer import Deliverer
from models.card import ModelCard
from models.errors import (
    Cancelled,
    GenerationFailed,
    HeliographError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from models.images import encode
from tests.app.conftest import CARDS, UPSCALER, MemoryRouter
from tests.app.loopback import always, serving, until

PACE = Pace(beat_s=0.05, look_s=0.01, backoff_s=(0.01, 0.01))
DRAW: dict[str, Any] = {"prompt": "a red circle", "steps": 2, "async": True}
X4 = ModelCard.read("x4", "sd_x4", "someone/x4", {"width": 512, "max_pixels": 256 * 256})
PNG = encode(np.full((64, 64, 3), 9, np.uint8), "png")


class House:
    """A gateway and a runner on one database."""

    def __init__(
        self,
        folder: Path,
        router: MemoryRouter,
        keyed: bool = False,
        fetch: FetchSettings | None = None,
        keeps: bool = False,
    ):
        self.folder = folder
        self.database = Database(f"sqlite:///{folder / 'jobs.db'}")
        self.router, self.store = router, JobStore(self.database, Bounds(waiting=20, per_owner=10), payload)
        self.keys, self.budgets = Keys(self.database, b"p" * 32), Budgets()
        kept = FolderSettings(path=str(folder / "pictures"))
        settings = GatewaySettings(
            auth="keys" if keyed else "open",
            store=kept,
            secret_file=str(folder / "secret"),
            jobs=QueueSettings(),
            max_body_bytes=100_000,
        )
        pictures = stores.opened(kept, derive(read_or_make(folder / "secret"), "pictures"))
        metered = Metered(router, self.budgets)
        fetcher, outbox = Fetcher(fetch or FetchSettings()), Outbox(self.database)
        self.behind = pictures, metered.charge, fetcher.address
        jobs = Jobs(self.store, *self.behind)
        self.deliverer = Deliverer(outbox, fetcher)
        drawn = results.opened(settings, self.database) if keeps else None
        service, runners = Service(metered, None, drawn, jobs, outbox), Service(router, None, drawn)
        for one in (service, runners):
            one.offer(CARDS | {"x4": X4}, "sd15", lambda: (), UPSCALER)
        guard = Guard("keys", self.keys, self.budgets) if keyed else None
        self.app = ingress.build(service, settings, lambda: asyncio.sleep(0, None), guard)
        self.runner = Runner(
            "runner-1", self.store, Maker(self.store, pictures, drawing(runners), runners.upscale), PACE
        )

    def client(self, key: str = "") -> httpx2.AsyncClient:
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        headers = {"x-api-key": key} if key else {}
        return httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers, timeout=20)

    def work(self) -> None:
        """From now on jobs are claimed."""
        self.runner.offer(("sd15", "sdxl", "x4", "upscaler"))


@asynccontextmanager
async def another_gateway(house: House) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a second gateway on the same database."""
    second = House(house.folder, house.router)
    async with second.client() as client:
        yield client
    await second.database.close()


async def opened(
    folder: Path,
    router: MemoryRouter,
    keyed: bool = False,
    fetch: FetchSettings | None = None,
    keeps: bool = False,
) -> AsyncIterator[House]:
    house = House(folder, router, keyed, fetch, keeps)
    await house.database.migrate()
    task = asyncio.create_task(house.runner.run())
    yield house
    house.runner.stop()
    await asyncio.wait({task}, timeout=5)
    task.cancel()
    await house.database.close()


@pytest.fixture
async def house(tmp_path: Path, router: MemoryRouter) -> AsyncIterator[House]:
    async for house in opened(tmp_path, router):
        yield house


@pytest.fixture
async def keyed(tmp_path: Path, router: MemoryRouter) -> AsyncIterator[House]:
    async for house in opened(tmp_path, router, keyed=True):
        yield house


@pytest.fixture
async def client(house: House) -> AsyncIterator[httpx2.AsyncClient]:
    async with house.client() as client:
        yield client


async def finished(client: httpx2.AsyncClient, id: str) -> dict[str, Any]:
    answer = await client.get(f"/v1/jobs/{id}", headers={"prefer": "wait=10"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["preference-applied"] == "wait=10"
    assert answer.json()["finished_at"], answer.text
    return answer.json()


async def begun(router: MemoryRouter) -> None:
    """Once the router works on a request."""
    async with asyncio.timeout(10):
        while not router.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def refused(answer: httpx2.Response, status: int, field: str) -> None:
    assert (answer.status_code, answer.json()["error"].get("field")) == (status, field), answer.text


async def test_an_asynchronous_request_is_a_job_and_its_result_the_synchronous_answer(
    house: House, client: httpx2.AsyncClient
):
    answer = await client.post("/v1/generate", json=DRAW | {"seed": 7, "samples": 2})
    assert answer.status_code == 202
    queued = answer.json()
    id = queued["job_id"]
    assert answer.headers["location"] == f"/v1/jobs/{id}" == queued["urls"]["self"]
    assert (queued["status"], queued["position"], queued["eta_s"]) == ("queued", {"ahead": 0, "exact": True}, None)
    assert (queued["model"], queued["kind"], queued["attempt"]) == ("sd15", "generate", 0)
    house.work()
    done = await finished(client, id)
    assert (done["status"], done["attempt"], done["error"], done["position"]) == ("succeeded", 1, None, None)
    at_once = (
        await client.post("/v1/generate", json={"prompt": "a red circle", "steps": 2, "seed": 7, "samples": 2})
    ).json()
    assert set(at_once) <= set(done["result"])
    assert done["result"]["parameters"] == at_once["parameters"]
    for image, same in zip(done["result"]["images"], at_once["images"], strict=True):
        stored = await client.get(image["url"])
        assert stored.content == base64.b64decode(same["base64"])
    assert [image["seed"] for image in done["images"]] == [7, 8]
    assert (await client.get(f"/jobs/{id}")).json()["job_id"] == id


async def test_a_job_can_answer_in_base64(house: House, client: httpx2.AsyncClient):
    house.work()
    answer = await client.post("/v1/generate", json=DRAW | {"response": "base64"}, headers={"prefer": "wait"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "wait=60")
    [image] = answer.json()["result"]["images"]
    assert Image.open(io.BytesIO(base64.b64decode(image["base64"]))).size == (128, 128)
    assert "url" not in image


async def test_prefer_answers_with_the_job_as_it_stands_when_the_time_is_over(client: httpx2.AsyncClient):
    answer = await client.post("/v1/generate", json=DRAW, headers={"prefer": "respond-async, wait=1"})
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")


async def test_a_wait_that_is_none_makes_no_job(client: httpx2.AsyncClient):
    for wrong in ("wait=0", "wait=61"):
        refused(await client.post("/v1/generate", json=DRAW, headers={"prefer": wrong}), 422, "Prefer")
    assert (await client.get("/v1/jobs")).json()["jobs"] == []
    id = (await client.post("/v1/generate", json=DRAW)).json()["job_id"]
    await client.post(f"/v1/jobs/{id}/cancel")
    refused(await client.post(f"/v1/jobs/{id}/retry", headers={"prefer": "wait=0"}), 422, "Prefer")
    assert [job["job_id"] for job in (await client.get("/v1/jobs")).json()["jobs"]] == [id]


@pytest.mark.parametrize(
    ("path", "files", "fields"),
    [
        ("img2img", {"image": PNG}, {}),
        ("inpaint", {"image": PNG, "mask": PNG}, {}),
        ("outpaint", {"image": PNG}, {"left": "8"}),
        ("variations", {"image": PNG}, {}),
        ("upscale", {"image": PNG}, {"scale": "2"}),
        ("upscale", {"image": PNG}, {"model": "x4", "steps": "2"}),
    ],
)
async def test_every_way_to_draw_may_be_a_job(
    house: House, client: httpx2.AsyncClient, path: str, files: dict[str, bytes], fields: dict[str, str]
):
    house.work()
    prompt = {} if path == "upscale" else {"prompt": "x", "steps": "2"}
    answer = await client.post(f"/v1/{path}", files=files, data=prompt | fields | {"async": "true"})
    assert answer.status_code == 202, answer.text
    done = await finished(client, answer.json()["job_id"])
    assert (done["status"], done["kind"]) == ("succeeded", path), done["error"]
    assert (await client.get(done["result"]["images"][0]["url"])).status_code == 200


async def test_fields_of_a_job_that_go_nowhere_are_refused(client: httpx2.AsyncClient):
    plain = {"prompt": "x"}
    hook = "https://example.com/hook"
    refused(await client.post("/v1/generate", json=plain | {"webhook_url": hook}), 422, "webhook_url")
    refused(await client.post("/v1/generate", json=DRAW | {"webhook_events": ["start"]}), 422, "webhook_events")
    events = DRAW | {"webhook_url": hook, "webhook_events": ["begin"]}
    refused(await client.post("/v1/generate", json=events), 422, "webhook_events.0")
    refused(await client.post("/v1/generate", json=DRAW | {"webhook_url": "ftp://x/y"}), 422, "webhook_url")
    refused(await client.post("/v1/generate", json=DRAW | {"stream": True}), 422, "stream")
    refused(await client.post("/v1/generate", json=DRAW | {"steps": 0}), 422, "steps")
    refused(await client.get("/v1/jobs?colour=red"), 422, "colour")
    refused(await client.get("/v1/jobs?status=done"), 422, "status")
    refused(await client.get("/v1/jobs?limit=x"), 422, "limit")
    for name in ("status", "model", "kind", "cursor", "limit"):
        refused(await client.get(f"/v1/jobs?{name}=%00"), 422, name)
    assert (await client.post("/v1/generate", json=DRAW, headers={"accept": "image/png"})).status_code == 406


async def test_a_waiting_job_is_cancelled_and_tried_again_as_another(house: House, client: httpx2.AsyncClient):
    id = (await client.post("/v1/generate", json=DRAW | {"seed": 3})).json()["job_id"]
    refused(await client.post(f"/v1/jobs/{id}/retry"), 422, "id")
    assert (await client.post(f"/v1/jobs/{id}/cancel")).json()["status"] == "cancelled"
    assert (await client.post(f"/v1/jobs/{id}/cancel")).json()["status"] == "cancelled"
    again = await client.post(f"/v1/jobs/{id}/retry")
    assert (again.status_code, again.json()["retry_of"]) == (202, id)
    house.work()
    done = await finished(client, again.json()["job_id"])
    assert done["images"][0]["seed"] == 3
    assert (await client.get(f"/v1/jobs/{id}")).json()["status"] == "cancelled"


async def test_a_running_job_is_cancelled(house: House, client: httpx2.AsyncClient, router: MemoryRouter):
    router.gate.clear()
    house.work()
    id = (await client.post("/v1/generate", json=DRAW)).json()["job_id"]
    await begun(router)
    assert (await client.post(f"/v1/jobs/{id}/cancel")).json()["status"] == "cancelling"
    assert (await finished(client, id))["status"] == "cancelled"
    assert not router.running


async def test_a_failed_job_tells_its_error(house: House, client: httpx2.AsyncClient, router: MemoryRouter):
    router.failure = GenerationFailed("nan_latents", "the latents are not numbers")
    house.work()
    done = await finished(client, (await client.post("/v1/generate", json=DRAW)).json()["job_id"])
    assert (done["status"], done["result"]) == ("failed", None)
    expected = {"code": "nan_latents", "message": "the latents are not numbers", "field": None, "retryable": False}
    assert done["error"] == expected


async def test_jobs_are_listed_by_pages_and_filters(house: House, client: httpx2.AsyncClient):
    made = [(await client.post("/v1/generate", json=DRAW)).json()["job_id"] for _ in range(5)]
    await client.post(f"/v1/jobs/{made[0]}/cancel")
    seen, cursor = [], None
    while True:
        page = (await client.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {}))).json()
        seen += [job["job_id"] for job in page["jobs"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == made[::-1]
    some = (await client.get("/v1/jobs?status=cancelled,failed&model=sd15&kind=generate")).json()
    assert [job["job_id"] for job in some["jobs"]] == [made[0]]
    assert (await client.get("/v1/jobs?model=sdxl")).json() == {"jobs": [], "next": None}


def events_of(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        id, name, data = (line.partition(": ")[2] for line in block.split("\n"))
        found.append((int(id), name, json.loads(data)))
    return found


async def test_the_events_of_a_job_are_numbered_end_with_it_and_are_taken_up_again(
    house: House, client: httpx2.AsyncClient
):
    id = (await client.post("/v1/generate", json=DRAW | {"seed": 5})).json()["job_id"]
    reading = asyncio.create_task(client.get(f"/v1/jobs/{id}/events"))
    await asyncio.sleep(0.1)
    house.work()
    answer = await reading
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert [id for id, _, _ in events] == list(range(1, len(events) + 1))
    states = [data["status"] for _, name, data in events if name == "state"]
    assert states == ["queued", "running", "succeeded"]
    [output] = [data for _, name, data in events if name == "output"]
    assert (output["seed"], (await client.get(output["url"])).status_code) == (5, 200)
    rest = await client.get(f"/v1/jobs/{id}/events", headers={"last-event-id": "2"})
    assert [id for id, _, _ in events_of(rest.text)] == list(range(3, len(events) + 1))
    assert (await client.get(f"/v1/jobs/{id}/events", headers={"last-event-id": str(len(events))})).text == ""
    refused(await client.get(f"/v1/jobs/{id}/events", headers={"last-event-id": "x"}), 422, "Last-Event-ID")
    assert (await client.get(f"/v1/jobs/{'0' * 32}/events")).status_code == 404


async def test_the_time_to_come_is_told_by_what_the_last_jobs_took(house: House, client: httpx2.AsyncClient):
    house.work()
    first = (await client.post("/v1/generate", json=DRAW)).json()
    assert first["eta_s"] is None, "nothing was measured yet"
    done = await finished(client, first["job_id"])
    took = done["finished_at"] - done["started_at"]
    house.runner.offer(())
    async with another_gateway(house) as another:  # this one has looked just now
        waiting = [(await another.post("/v1/generate", json=DRAW)).json() for _ in range(2)]
        other = (await another.post("/v1/generate", json=DRAW | {"model": "sdxl"})).json()
    assert [job["eta_s"] for job in waiting] == [pytest.approx(took), pytest.approx(2 * took)]
    assert waiting[1]["position"] == {"ahead": 1, "exact": True}
    assert other["eta_s"] is None


async def test_a_key_makes_one_job_however_often_it_is_sent(house: House, client: httpx2.AsyncClient):
    headers = {"idempotency-key": "order 1"}
    answers = await asyncio.gather(*(client.post("/v1/generate", json=DRAW, headers=headers) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    same = await client.post("/v1/generate", content=json.dumps(dict(reversed(DRAW.items()))), headers=headers)
    assert same.headers["idempotency-replayed"] == "true"
    refused(await client.post("/v1/generate", json=DRAW | {"steps": 3}, headers=headers), 422, "Idempotency-Key")
    other = await client.post("/v1/variations", json=DRAW | {"seed": 1}, headers=headers)
    assert other.json()["job_id"] != answers[0].json()["job_id"], "a key belongs to its path"
    refused(
        await client.post("/v1/generate", json=DRAW, headers={"idempotency-key": "x" * 256}), 422, "Idempotency-Key"
    )


async def test_a_refused_request_does_not_use_its_key_up(client: httpx2.AsyncClient):
    headers = {"idempotency-key": "order 2"}
    refused(await client.post("/v1/generate", json=DRAW | {"steps": 0}, headers=headers), 422, "steps")
    answer = await client.post("/v1/generate", json=DRAW, headers=headers)
    assert (answer.status_code, "idempotency-replayed" in answer.headers) == (202, False)


async def test_files_count_for_a_key_by_what_is_in_them(house: House, client: httpx2.AsyncClient):
    other = encode(np.full((64, 64, 3), 10, np.uint8), "png")
    headers, fields = {"idempotency-key": "order 3"}, {"prompt": "x", "async": "true"}
    first = await client.post("/v1/img2img", files={"image": PNG}, data=fields, headers=headers)
    again = await client.post("/v1/img2img", files={"image": PNG}, data=fields, headers=headers)
    assert again.json()["job_id"] == first.json()["job_id"]
    refused(
        await client.post("/v1/img2img", files={"image": other}, data=fields, headers=headers), 422, "Idempotency-Key"
    )


async def test_a_synchronous_answer_is_given_again(house: House, client: httpx2.AsyncClient, router: MemoryRouter):
    house.work()
    body, headers = {"prompt": "a red circle", "steps": 2}, {"idempotency-key": "order 4"}
    first = await client.post("/v1/generate", json=body, headers=headers)
    again = await client.post("/v1/generate", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (200, 200), first.text
    assert ("idempotency-replayed" in first.headers, again.headers["idempotency-replayed"]) == (False, "true")
    assert again.json() == first.json()
    assert len(router.requests) == 1
    picture = {"accept": "image/png", "idempotency-key": "order 5"}
    pictures = [await client.post("/v1/generate", json=body, headers=picture) for _ in range(2)]
    assert pictures[0].content == pictures[1].content
    assert (pictures[1].headers["content-type"], len(router.requests)) == ("image/png", 2)


async def test_a_synchronous_request_in_flight_is_409_and_goes_on_without_its_caller(
    house: House, client: httpx2.AsyncClient, router: MemoryRouter
):
    router.gate.clear()
    house.work()
    body, headers = {"prompt": "a red circle", "steps": 2}, {"idempotency-key": "order 6"}
    asking = asyncio.create_task(client.post("/v1/generate", json=body, headers=headers))
    await begun(router)
    second = await client.post("/v1/generate", json=body, headers=headers)
    assert (second.status_code, second.json()["error"]["code"]) == (409, "in_flight")
    assert int(second.headers["retry-after"]) >= 1
    asking.cancel()
    await asyncio.wait({asking})
    router.gate.set()
    id = (await client.get("/v1/jobs")).json()["jobs"][0]["job_id"]
    await finished(client, id)
    late = await client.post("/v1/generate", json=body, headers=headers)
    assert (late.status_code, late.headers["idempotency-replayed"]) == (200, "true")
    assert len(router.requests) == 1


async def test_a_synchronous_error_is_given_again(house: House, client: httpx2.AsyncClient, router: MemoryRouter):
    router.failure = GenerationFailed("nan_latents", "the latents are not numbers")
    house.work()
    body, headers = {"prompt": "a red circle", "steps": 2}, {"idempotency-key": "order 7"}
    answers = [await client.post("/v1/generate", json=body, headers=headers) for _ in range(2)]
    assert {(a.status_code, a.json()["error"]["code"]) for a in answers} == {(500, "nan_latents")}
    assert answers[0].json() == answers[1].json()
    assert ["idempotency-replayed" in answer.headers for answer in answers] == [False, True]
    assert len(router.requests) == 1
    refused(await client.post("/v1/generate", json=body | {"stream": True}, headers=headers), 422, "Idempotency-Key")


async def test_an_upscaled_picture_is_given_again(house: House, client: httpx2.AsyncClient, router: MemoryRouter):
    house.work()
    headers = {"idempotency-key": "order 8"}
    answers = [await client.post("/v1/upscale", files={"image": PNG}, headers=headers) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert len(router.upscales) == 1
    assert Image.open(io.BytesIO(base64.b64decode(answers[0].json()["images"][0]["base64"]))).size == (128, 128)


async def test_transparency_outlives_the_queue(house: House, client: httpx2.AsyncClient, router: MemoryRouter):
    seen: list[bytes] = []
    enlarge = router.upscale

    async def look(picture: bytes, *rest: Any) -> Any:
        seen.append(picture)
        return await enlarge(picture, *rest)

    router.upscale = look  # pyright: ignore[reportAttributeAccessIssue]
    house.work()
    clear = io.BytesIO()
    Image.new("RGBA", (64, 64), (9, 9, 9, 40)).save(clear, "PNG")
    answer = await client.post("/v1/upscale", files={"image": clear.getvalue()}, data={"async": "true"})
    await finished(client, answer.json()["job_id"])
    assert Image.open(io.BytesIO(seen[0])).getpixel((3, 3)) == (9, 9, 9, 40)


async def test_a_second_try_is_given_again_after_the_first_jobs_data_is_removed(
    house: House, client: httpx2.AsyncClient
):
    id = (await client.post("/v1/generate", json=DRAW)).json()["job_id"]
    await client.post(f"/v1/jobs/{id}/cancel")
    path, headers = f"/v1/jobs/{id}/retry", {"idempotency-key": "order 9"}
    again = await client.post(path, headers=headers)
    await house.store.prune(keep_s=-1.0, forget_s=1000.0)
    refused(await client.post(path), 422, "id")
    replayed = await client.post(path, headers=headers)
    assert (replayed.status_code, replayed.headers["idempotency-replayed"]) == (202, "true")
    assert replayed.json()["job_id"] == again.json()["job_id"] != id


def test_a_field_that_is_yet_to_come_leaves_a_key_what_it_is():
    class Later(GenerateBody):
        style: str = "plain"

    def fingerprint(body: GenerateBody) -> str:
        headers = [(b"idempotency-key", b"order 10")]
        scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": headers, "query_string": b""}
        wanted = submission.delivery(Request(scope), body, "application/json", asynchronous=False)
        assert wanted
        assert wanted.idempotency
        return wanted.idempotency.fingerprint

    said = {"prompt": "x", "hires": {"scale": 1.5}}
    first = fingerprint(GenerateBody.model_validate(said))
    assert fingerprint(Later.model_validate(said)) == first
    assert fingerprint(Later.model_validate(said | {"style": "cubist"})) != first


@pytest.mark.parametrize(
    "error",
    [
        Overloaded(9, "too much waits"),
        Unavailable(9, "the store is away"),
        StorageFull(9, "the disk is full"),
        Cancelled("somebody ended it"),
        InvalidRequest("steps", "is too large"),
        NotFound("no such model"),
        GenerationFailed("out_of_memory", "too large for the device"),
        GenerationFailed("nan_latents", "not a number"),
    ],
)
async def test_an_error_that_ended_a_job_is_told_as_it_would_have_been_at_once(house: House, error: HeliographError):
    new = NewJob(owner="ada", model="none", kind="generate", request={})
    await house.store.submit(new)
    [claim] = await house.store.claim("runner-2", ["none"], 1, 30.0)
    told = failures.ended_by(await house.store.fail(claim, failures.job_error(error), retry=False))
    assert (envelope(told), status_of(told)) == (envelope(error), status_of(error))


async def test_a_replay_of_a_receipt_takes_no_key(client: httpx2.AsyncClient):
    answer = await client.post("/v1/replay", json={"receipt_id": "0" * 32}, headers={"idempotency-key": "order 11"})
    refused(answer, 422, "Idempotency-Key")


async def test_jobs_are_told_while_the_store_is_away(house: House, client: httpx2.AsyncClient):
    house.work()
    bodies = [DRAW, DRAW | {"response": "base64"}]
    ids = [(await client.post("/v1/generate", json=body)).json()["job_id"] for body in bodies]
    [done, _] = [await finished(client, id) for id in ids]
    house.runner.offer(())
    waiting = (await client.post("/v1/generate", json=DRAW)).json()["job_id"]
    results = house.folder / "pictures" / "results"
    results.rename(house.folder / "elsewhere")
    for outage in (True, False):
        results.touch() if outage else results.unlink()
        by_address, in_base64 = [await client.get(f"/v1/jobs/{id}") for id in ids]
        assert (by_address.status_code, by_address.json()["status"]) == (200, "succeeded")
        told = in_base64.json()
        assert (in_base64.status_code, told["result"]["images"][0]["base64"]) == (200, None)
        assert told["images"][0]["url"]
        assert (await client.get("/v1/jobs")).status_code == 200
        assert "event: output" in (await client.get(f"/v1/jobs/{ids[0]}/events")).text
        for path in (f"{ids[0]}/cancel", f"{waiting}/cancel", f"{waiting}/retry"):
            assert (await client.post(f"/v1/jobs/{path}")).status_code in (200, 202)
    (house.folder / "elsewhere").rename(results)
    again = (await client.get(f"/v1/jobs/{ids[0]}")).json()
    assert again["images"][0]["sha256"] == done["images"][0]["sha256"]
    assert (await client.get(again["images"][0]["url"])).status_code == 200


async def test_who_reads_events_does_not_notice_that_the_database_was_away(house: House, client: httpx2.AsyncClient):
    job = (await client.post("/v1/generate", json=DRAW)).json()["job_id"]
    await client.post(f"/v1/jobs/{job}/cancel")

    class Away(JobStore):
        looks = 3

        async def events(self, *args: Any, **options: Any) -> Any:
            self.looks -= 1
            if self.looks >= 0:
                raise Unavailable(1.0, "the database does not answer")
            return await super().events(*args, **options)

    seen = [event async for event in Jobs(Away(house.database), *house.behind).events(job, 0)]
    assert seen[:3] == [None] * 3
    assert [event.data["state"] for event in seen if event] == ["queued", "cancelled"]


async def test_events_end_with_a_comment_where_the_database_stays_away():
    class Away:
        async def events(self, id: str, after_seq: int) -> AsyncIterator[JobEvent]:
            yield JobEvent(job_id=id, seq=1, at=0.0, kind="state", data={"state": "queued", "attempt": 0})
            raise Unavailable(1.0, "the database does not answer")

    told = [event async for event in _events(Away(), "a", 0)]  # pyright: ignore[reportArgumentType]
    assert told[0].startswith(b"id: 1\nevent: state")
    assert told[1:] == [b": the database does not answer; come back\n\n"]


async def test_a_job_that_another_version_wrote_is_told_and_hinders_no_other(
    house: House, client: httpx2.AsyncClient, router: MemoryRouter
):
    house.work()
    id = (await client.post("/v1/generate", json=DRAW | {"hires": {"scale": 2.0}})).json()["job_id"]
    done = await finished(client, id)
    request = (await house.store.get(id, None)).request
    hires = {**request["request"]["hires"], "aura": 1}
    for newer in ({"aura": 1}, {"hires": hires}):
        values = {**request, "request": {**request["request"], **newer}}
        await house.database.write(lambda c, values=values: c.execute(update(tables.jobs).values(request=values)))
        told = (await client.get(f"/v1/jobs/{id}")).json()
        assert told["status"] == "succeeded"
        assert (told["result"], told["images"][0]["sha256"]) == (None, done["images"][0]["sha256"])
        async with another_gateway(house) as another:  # which has measured nothing yet
            assert (await another.post("/v1/generate", json=DRAW)).status_code == 202


async def test_a_full_queue_is_429(client: httpx2.AsyncClient):
    answers = [await client.post("/v1/generate", json=DRAW) for _ in range(11)]
    assert [answer.status_code for answer in answers] == [202] * 10 + [429]
    assert int(answers[-1].headers["retry-after"]) >= 1


async def test_another_callers_job_is_like_one_that_never_was(keyed: House):
    mine, theirs, boss = [
        (await keyed.keys.create(name, scopes, Limits()))[1]
        for name, scopes in (("a", ("generate", "jobs")), ("b", ("generate", "jobs")), ("c", ("jobs", "admin")))
    ]
    async with keyed.client(mine) as me, keyed.client(theirs) as other, keyed.client(boss) as admin:
        id = (await me.post("/v1/generate", json=DRAW)).json()["job_id"]
        for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/retry")):
            answers = [await other.request(method, f"/v1/jobs/{job}{path}") for job in (id, "0" * 32)]
            assert [a.status_code for a in answers] == [404, 404]
            texts = [a.text.replace(id, "") for a in answers]
            assert texts[0] == texts[1].replace("0" * 32, "")
        assert (await other.get("/v1/jobs")).json()["jobs"] == []
        assert (await me.get(f"/v1/jobs/{id}")).json()["status"] == "queued"
        assert (await admin.get(f"/v1/jobs/{id}")).status_code == 200
        assert [job["job_id"] for job in (await admin.get("/v1/jobs")).json()["jobs"]] == [id]


async def test_of_a_callers_jobs_no_more_run_than_its_key_allows(keyed: House, router: MemoryRouter):
    router.gate.clear()
    key = (await keyed.keys.create("painter", ("generate", "jobs"), Limits(concurrent_jobs=2)))[1]
    async with keyed.client(key) as client:
        ids = [(await client.post("/v1/generate", json=DRAW)).json()["job_id"] for _ in range(5)]
        keyed.work()
        await until(lambda: len(router.running) == 2)
        await asyncio.sleep(0.2)
        assert len(router.running) == 2
        router.gate.set()
        ends = [await client.get(f"/v1/jobs/{id}", headers={"prefer": "wait=10"}) for id in ids]
    assert [end.json()["status"] for end in ends] == ["succeeded"] * 5


async def test_a_server_that_keeps_no_jobs_says_so(router: MemoryRouter):
    service = Service(router)
    service.offer(CARDS, "sd15")
    app = ingress.build(service, GatewaySettings(auth="open"), lambda: asyncio.sleep(0, None))
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answers = [
            await client.post("/v1/generate", json=DRAW),
            await client.post("/v1/generate", json={"prompt": "x"}, headers={"idempotency-key": "a"}),
        ]
    assert [(answer.status_code, "keeps no jobs" in answer.text) for answer in answers] == [(404, True)] * 2


@pytest.mark.parametrize("response", ["url", "base64"])
async def test_a_webhook_tells_what_the_job_tells(tmp_path: Path, router: MemoryRouter, response: str):
    """But for the pictures themselves, and that addresses in it are good for longer."""
    async with serving(always()) as receiver:
        fetch = FetchSettings(ports=(receiver.port,), allowed=("127.0.0.1",))
        async for house in opened(tmp_path, router, fetch=fetch):
            delivering = asyncio.create_task(house.deliverer.run())
            house.work()
            wanted = {"webhook_url": receiver.url(), "webhook_events": ["start", "completed"], "response": response}
            async with house.client() as client:
                secret = (await client.get("/v1/webhooks/secret")).json()["secret"]
                id = (await client.post("/v1/generate", json=DRAW | wanted | {"samples": 2})).json()["job_id"]
                job = await finished(client, id)
                await until(lambda: len(receiver.requests) == 2)
                told = [Verifier(secret).verify(request.body, request.headers) for request in receiver.requests]
                end = next(body for body in told if body["type"] == "job.completed")
                assert [(await client.get(image["url"])).status_code for image in end["images"]] == [200, 200]
            house.deliverer.stop()
            await delivering
    assert {(body["type"], body["status"], body["job_id"]) for body in told} == {
        ("job.start", "running", id),
        ("job.completed", "succeeded", id),
    }
    assert not any(b"base64" in request.body for request in receiver.requests)
    for value in (job, end["data"]):
        for image in [*value["images"], *value["result"]["images"]]:
            image.pop("url", None)
            image.pop("base64", None)
    assert end["data"] == job
    assert "truncated" not in end
