"""`"async": "when_cold"`: a job where the model sleeps, the pictures where it is awake."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app import ingress
from app.events import ModelState
from app.service import Service
from app.settings import GatewaySettings
from tests.app.conftest import CARDS, MemoryRouter
from tests.app.test_jobs import PNG, House, finished, opened, refused

DRAW: dict[str, Any] = {"prompt": "a red circle", "steps": 2, "async": "when_cold"}


@pytest.fixture
async def house(tmp_path: Path, router: MemoryRouter) -> AsyncIterator[House]:
    async for house in opened(tmp_path, router):
        house.work()
        yield house


@pytest.fixture
async def client(house: House) -> AsyncIterator[httpx2.AsyncClient]:
    async with house.client() as client:
        yield client


@pytest.mark.parametrize("state", ["cold", "loading"])
async def test_a_model_that_sleeps_is_given_a_job(client: httpx2.AsyncClient, router: MemoryRouter, state: ModelState):
    router.states["sd15"] = state
    answer = await client.post("/v1/generate", json=DRAW)
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['job_id']}"
    assert (await finished(client, answer.json()["job_id"]))["status"] == "succeeded"


@pytest.mark.parametrize("state", ["ready", "failed", "missing"])
async def test_any_other_is_asked_at_once(client: httpx2.AsyncClient, router: MemoryRouter, state: ModelState):
    """One that does not run at all says so itself; here it draws."""
    router.states["sd15"] = state
    answer = await client.post("/v1/generate", json=DRAW)
    assert (answer.status_code, len(answer.json()["images"])) == (200, 1)


async def test_the_model_that_is_named_decides(client: httpx2.AsyncClient, router: MemoryRouter):
    router.states["sdxl"] = "cold"
    assert (await client.post("/v1/generate", json=DRAW)).status_code == 200
    assert (await client.post("/v1/generate", json=DRAW | {"model": "sdxl"})).status_code == 202
    assert (await client.post("/v1/generate", json=DRAW | {"model": "sd9"})).status_code == 404


async def test_a_picture_is_what_accept_asks_for_and_a_job_is_json(client: httpx2.AsyncClient, router: MemoryRouter):
    headers = {"accept": "image/png"}
    awake = await client.post("/v1/generate", json=DRAW, headers=headers)
    router.states["sd15"] = "cold"
    asleep = await client.post("/v1/generate", json=DRAW, headers=headers)
    assert (awake.status_code, awake.headers["content-type"]) == (200, "image/png")
    assert (asleep.status_code, asleep.headers["content-type"]) == (202, "application/json")


async def test_upscalers_sleep_too(client: httpx2.AsyncClient, router: MemoryRouter):
    states: tuple[tuple[ModelState, int], ...] = (("ready", 200), ("cold", 202))
    for state, status in states:
        router.states["upscaler"] = state
        answer = await client.post("/v1/upscale", files={"image": PNG}, data={"async": "when_cold"})
        assert answer.status_code == status, answer.text
    for state, status in states:
        router.states["x4"] = state
        answer = await client.post("/v1/upscale", files={"image": PNG}, data={"model": "x4", "async": "when_cold"})
        assert answer.status_code == status, answer.text


async def test_a_key_means_the_same_request_before_and_after_it_woke(client: httpx2.AsyncClient, router: MemoryRouter):
    router.states["sd15"] = "cold"
    headers = {"idempotency-key": "order 11"}
    job = await client.post("/v1/generate", json=DRAW | {"response": "base64"}, headers=headers)
    assert job.status_code == 202
    await finished(client, job.json()["job_id"])
    router.states["sd15"] = "ready"
    drawn = len(router.requests)
    answer = await client.post("/v1/generate", json=DRAW | {"response": "base64"}, headers=headers)
    assert (answer.status_code, answer.headers["idempotency-replayed"]) == (200, "true")
    assert len(answer.json()["images"]) == 1
    assert len(router.requests) == drawn


async def test_what_does_not_go_with_it_is_refused_whether_the_model_sleeps_or_not(
    client: httpx2.AsyncClient, router: MemoryRouter
):
    states: tuple[ModelState, ...] = ("ready", "cold")
    for state in states:
        router.states["sd15"] = state
        hook = {"webhook_url": "https://example.com/hook"}
        refused(await client.post("/v1/generate", json=DRAW | hook), 422, "webhook_url")
        refused(await client.post("/v1/generate", json=DRAW | {"stream": True}), 422, "stream")
        answer = await client.post("/v1/generate", json=DRAW | {"async": "when_warm"})
        refused(answer, 422, "async")
        assert "true, false or when_cold" in answer.text
        refused(
            await client.post("/v1/img2img", files={"image": PNG}, data={"prompt": "x", "async": "1"}), 422, "async"
        )


async def test_a_server_that_keeps_no_jobs_says_so_before_anybody_waits(router: MemoryRouter):
    service = Service(router)
    service.offer(CARDS, "sd15")
    app = ingress.build(service, GatewaySettings(auth="open"), lambda: asyncio.sleep(0, None))
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post("/v1/generate", json=DRAW)
        document = (await client.get("/openapi.json")).json()
    assert (answer.status_code, "keeps no jobs" in answer.text) == (404, True)
    body = document["paths"]["/v1/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["async"]["anyOf"] == [{"type": "boolean"}, {"const": "when_cold"}]
