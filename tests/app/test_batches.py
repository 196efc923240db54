"""Batches through the whole gateway: a file of requests, its jobs, their answers."""

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.dialects.native import batch_lines
from app.jobs.batches import BatchSubmission
from app.jobs.submission import Bounds
from app.keys.caller import Limits
from models.errors import GenerationFailed, InvalidRequest, Unavailable
from tests.app.conftest import MemoryRouter
from tests.app.test_jobs import PNG, House, begun, opened, refused

LINE: dict[str, Any] = {"prompt": "a red circle", "steps": 2, "seed": 7}
IMAGES = {"prompt": "a star", "n": 2, "size": "64x96", "response_format": "b64_json", "model": "sdxl"}


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


def openai(custom_id: str, body: dict[str, Any], url: str = "/v1/images/generations") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def file(*lines: Any) -> bytes:
    return b"\n".join(json.dumps(line).encode() for line in lines)


async def sent(client: httpx2.AsyncClient, *lines: Any, **headers: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await client.post("/v1/batches", content=file(*lines), headers=named)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/batches/{answer.json()['id']}"
    return answer.json()


async def done(client: httpx2.AsyncClient, id: str) -> dict[str, Any]:
    for job in (await client.get("/v1/jobs", params={"limit": 200})).json()["jobs"]:
        await client.get(f"/v1/jobs/{job['job_id']}", headers={"prefer": "wait=10"})
    return (await client.get(f"/v1/batches/{id}")).json()


async def results(client: httpx2.AsyncClient, id: str) -> list[dict[str, Any]]:
    answer = await client.get(f"/v1/batches/{id}/results")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/jsonl")
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_a_file_of_requests_is_drawn_and_answered_line_by_line(house: House, client: httpx2.AsyncClient):
    lines = [LINE, openai("mine", LINE | {"response": "base64"}, "/v1/generate"), openai("theirs", IMAGES)]
    batch = await sent(client, *lines)
    assert (batch["object"], batch["status"]) == ("batch", "in_progress")
    assert batch["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    assert await results(client, batch["id"]) == []
    house.work()
    batch = await done(client, batch["id"])
    assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 3)
    assert batch["completed_at"] >= batch["in_progress_at"] >= batch["created_at"]
    first, second, third = await results(client, batch["id"])
    assert [line["custom_id"] for line in (first, second, third)] == ["line-1", "mine", "theirs"]
    assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in (first, second, third))
    [image] = first["response"]["body"]["images"]
    stored = (await client.get(image["url"])).content
    assert base64.b64decode(second["response"]["body"]["images"][0]["base64"]) == stored
    images = third["response"]["body"]
    assert [set(one) for one in images["data"]] == [{"b64_json"}] * 2
    drawn = {request.model: request for request in house.router.requests}
    assert (drawn["sdxl"].width, drawn["sdxl"].height, drawn["sdxl"].samples) == (64, 96, 2)
    assert all(request.priority == "batch" for request in house.router.requests)


async def test_lines_that_fail_are_told_beside_the_others(
    house: House, client: httpx2.AsyncClient, router: MemoryRouter
):
    router.failure = GenerationFailed("nan_latents")
    batch = await sent(client, LINE)
    house.work()
    batch = await done(client, batch["id"])
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 1, "completed": 0, "failed": 1})
    [line] = await results(client, batch["id"])
    assert line["error"]["code"] == line["response"]["body"]["error"]["code"] == "nan_latents"
    assert line["response"]["status_code"] == 500


async def test_a_file_is_a_forms_file_too(client: httpx2.AsyncClient):
    one = await client.post("/v1/batches", files={"file": ("a.jsonl", file(LINE, LINE))})
    assert (one.status_code, one.json()["request_counts"]["total"]) == (202, 2)
    refused(await client.post("/v1/batches", files={"purpose": ("a.jsonl", file(LINE))}), 422, "purpose")
    refused(await client.post("/v1/batches", data={"a": "b"}, files={"file": ("a", file(LINE))}), 422, "a")
    refused(await client.post("/v1/batches", files=[("file", ("a", b"{}"))] * 2), 400, "file")


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{no json", "lines.2"),
        ("[1]", "lines.2"),
        (json.dumps(LINE | {"steps": 0}), "lines.2.steps"),
        (json.dumps(LINE | {"promt": "a"}), "lines.2.promt"),
        (json.dumps(LINE | {"model": "none"}), "lines.2"),
        (json.dumps(LINE | {"async": True}), "lines.2.async"),
        (json.dumps(LINE | {"stream": False}), "lines.2.stream"),
        (json.dumps(LINE | {"webhook_url": "https://example.org"}), "lines.2.webhook_url"),
        (json.dumps(LINE | {"priority": "interactive"}), "lines.2.priority"),
        (json.dumps(LINE | {"image": "https://example.org/a.png"}), "lines.2.image"),
        (json.dumps(LINE | {"image": "bm8="}), "lines.2.image"),
        (json.dumps(openai("a", IMAGES | {"size": "large"})), "lines.2.size"),
        (json.dumps(openai("a", IMAGES | {"size": "63x64"})), "lines.2.width"),
        (json.dumps(openai("a", IMAGES | {"n": 0})), "lines.2.n"),
        (json.dumps(openai("a", IMAGES | {"quality": "hd"})), "lines.2.quality"),
        (json.dumps(openai("a", IMAGES, "/v1/chat/completions")), "lines.2.url"),
        (json.dumps(openai("a", IMAGES) | {"method": "GET"}), "lines.2.method"),
        (json.dumps(openai("line-1", IMAGES)), "lines.2.custom_id"),
        (json.dumps(openai("", IMAGES)), "lines.2.custom_id"),
        (json.dumps(openai("a\0b", IMAGES)), "lines.2.custom_id"),
    ],
)
async def test_one_wrong_line_refuses_all_and_is_named(client: httpx2.AsyncClient, line: str, field: str):
    answer = await client.post("/v1/batches", content=file(LINE) + b"\n\n" + line.encode())
    refused(answer, 422, field)
    assert (await client.get("/v1/batches")).json()["data"] == []
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


async def test_a_file_without_lines_or_with_too_many_is_refused(house: House, client: httpx2.AsyncClient):
    refused(await client.post("/v1/batches", content=b"\n \n"), 400, "body")
    house.store.bounds = replace(house.store.bounds, lines_at_once=2)
    refused(await client.post("/v1/batches", content=file(LINE, LINE, LINE)), 400, "body")
    house.store.bounds = Bounds(lines_per_owner=2)  # 429 would say that it can come back
    refused(await client.post("/v1/batches", content=file(LINE, LINE, LINE)), 400, "body")


async def test_lines_beyond_what_may_wait_are_429(house: House, client: httpx2.AsyncClient):
    house.store.bounds = Bounds(lines=3)
    await sent(client, LINE, LINE)
    answer = await client.post("/v1/batches", content=file(LINE, LINE))
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1


async def test_a_key_makes_one_batch(client: httpx2.AsyncClient):
    first = await sent(client, LINE, idempotency_key="k")
    second = await client.post("/v1/batches", content=file(LINE), headers={"idempotency-key": "k"})
    assert (second.json()["id"], second.headers["idempotency-replayed"]) == (first["id"], "true")
    other = await client.post("/v1/batches", content=file(LINE, LINE), headers={"idempotency-key": "k"})
    refused(other, 422, "Idempotency-Key")
    assert len((await client.get("/v1/batches")).json()["data"]) == 1


async def test_a_batch_is_cancelled(house: House, client: httpx2.AsyncClient, router: MemoryRouter):
    router.gate.clear()
    batch = await sent(client, *[LINE] * 12)
    house.work()
    await begun(router)
    answer = await client.post(f"/v1/batches/{batch['id']}/cancel")
    assert answer.json()["status"] in ("cancelling", "cancelled")
    batch = await done(client, batch["id"])
    assert (batch["status"], batch["request_counts"]) == ("cancelled", {"total": 12, "completed": 0, "failed": 12})
    assert batch["cancelled_at"] >= batch["cancelling_at"]
    assert batch["completed_at"] is None
    codes = {line["error"]["code"] for line in await results(client, batch["id"])}
    assert codes == {"cancelled"}


async def test_batches_are_listed_by_pages(client: httpx2.AsyncClient):
    ids = [(await sent(client, LINE))["id"] for _ in range(3)][::-1]
    page = (await client.get("/v1/batches", params={"limit": 2})).json()
    assert [one["id"] for one in page["data"]] == ids[:2] == [page["first_id"], page["last_id"]]
    assert page["has_more"]
    rest = (await client.get("/v1/batches", params={"limit": 2, "after": page["last_id"]})).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[2:], False)
    refused(await client.get("/v1/batches", params={"limit": "many"}), 422, "limit")
    refused(await client.get("/v1/batches", params={"before": "a"}), 422, "before")


async def test_a_picture_of_a_line_is_kept_until_it_is_its_turn(house: House, client: httpx2.AsyncClient):
    batch = await sent(client, LINE | {"image": base64.b64encode(PNG).decode()})
    house.work()
    assert (await done(client, batch["id"]))["request_counts"]["completed"] == 1
    assert house.router.requests[0].image is not None


async def test_a_batch_whose_commit_broke_keeps_its_pictures(
    house: House, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    """It is there, as far as anybody knows."""
    submit = house.store.submit_batch

    async def broken(*args: Any) -> BatchSubmission:
        await submit(*args)
        raise Unavailable(1.0, "the connection broke during the commit")

    monkeypatch.setattr(house.store, "submit_batch", broken)
    lines = file(LINE | {"image": base64.b64encode(PNG).decode()})
    assert (await client.post("/v1/batches", content=lines)).status_code == 503
    [batch] = (await client.get("/v1/batches")).json()["data"]
    house.work()
    assert (await done(client, batch["id"]))["request_counts"]["completed"] == 1


async def test_another_callers_batch_is_like_one_that_never_was(keyed: House):
    ada, bob = [(await keyed.keys.create(name, ("generate", "jobs"), Limits()))[1] for name in ("ada", "bob")]
    async with keyed.client(ada) as one, keyed.client(bob) as other:
        id = (await sent(one, LINE))["id"]
        for answer in (
            await other.get(f"/v1/batches/{id}"),
            await other.get(f"/v1/batches/{id}/results"),
            await other.post(f"/v1/batches/{id}/cancel"),
            await other.get("/v1/batches", params={"after": id}),
        ):
            assert answer.status_code == 404
        assert (await other.get("/v1/batches")).json()["data"] == []
        assert (await one.get(f"/v1/batches/{id}")).json()["status"] == "in_progress"


async def test_lines_cost_what_they_would_alone_and_nothing_where_the_batch_is_refused(keyed: House):
    cost = 128 * 128 * 2
    limits = Limits(pixel_steps_per_minute=3 * cost)
    key = (await keyed.keys.create("ada", ("generate", "jobs"), limits))[1]
    async with keyed.client(key) as client:
        answer = await client.post("/v1/batches", content=file(*[LINE] * 4))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "budget_spent")
        await sent(client, *[LINE] * 3)
        assert (await client.post("/v1/batches", content=file(LINE))).status_code == 429


def test_lines_are_read_without_a_server():
    [(custom_id, url, request, delivery)] = batch_lines.read(file(LINE), "sd15", 1)
    assert (custom_id, url, request.model, request.priority) == ("line-1", "/v1/generate", "sd15", "batch")
    assert (delivery.response, delivery.cache) == ("url", True)
    with pytest.raises(InvalidRequest, match="1 to 1 lines"):
        batch_lines.read(file(LINE, LINE), "sd15", 1)
