"""Jobs where results are kept: they are found in the cache, have receipts, and answer by address."""

import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.app.conftest import MemoryRouter
from tests.app.test_jobs import PNG, House, finished, opened, refused

BODY: dict[str, Any] = {"prompt": "a red circle", "steps": 2, "seed": 7}
KEY = {"idempotency-key": "a"}


@pytest.fixture
async def house(tmp_path: Path, router: MemoryRouter) -> AsyncIterator[House]:
    async for house in opened(tmp_path, router, keeps=True):
        house.work()
        yield house


@pytest.fixture
async def client(house: House) -> AsyncIterator[httpx2.AsyncClient]:
    async with house.client() as client:
        yield client


async def result(client: httpx2.AsyncClient, **body: Any) -> dict[str, Any]:
    """What a job comes to."""
    answer = await client.post("/v1/generate", json=BODY | body | {"async": True})
    assert answer.status_code == 202, answer.text
    done = await finished(client, answer.json()["job_id"])
    assert done["status"] == "succeeded", done["error"]
    return done["result"]


async def check_address(client: httpx2.AsyncClient, image: dict[str, Any]) -> None:
    stored = await client.get(image["url"])
    assert hashlib.sha256(stored.content).hexdigest() == image["sha256"]
    assert "base64" not in image


async def test_a_job_takes_what_was_drawn_before_and_is_found_again(client: httpx2.AsyncClient, router: MemoryRouter):
    drawn = await result(client)
    assert drawn["cached"] is False
    assert (await client.get(f"/v1/receipts/{drawn['receipt_id']}")).json()["request"]["seed"] == 7
    again = await result(client)
    at_once = (await client.post("/v1/generate", json=BODY)).json()
    assert (again["cached"], at_once["cached"]) == (True, True)
    assert again["receipt_id"] == at_once["receipt_id"] == drawn["receipt_id"]
    assert len(router.requests) == 1
    await check_address(client, again["images"][0])


@pytest.mark.parametrize("body", [{"cache": False}, {"seed": None}])
async def test_a_job_that_is_not_to_be_found_draws(
    client: httpx2.AsyncClient, router: MemoryRouter, body: dict[str, Any]
):
    assert [(await result(client, **body))["cached"] for _ in range(2)] == [False, False]
    assert len(router.requests) == 2


@pytest.mark.parametrize("headers", [{}, KEY])
@pytest.mark.parametrize(
    ("path", "body"),
    [("generate", BODY), ("upscale", {"scale": 2.0}), ("upscale", {"model": "x4", "steps": 2})],
    ids=["generate", "upscale", "x4"],
)
async def test_a_synchronous_answer_may_have_addresses(
    client: httpx2.AsyncClient, headers: dict[str, str], path: str, body: dict[str, Any], small: str
):
    given = body if path == "generate" else body | {"image": small}
    answer = await client.post(f"/v1/{path}", json=given | {"response": "url"}, headers=headers)
    assert answer.status_code == 200, answer.text
    [image] = answer.json()["images"]
    await check_address(client, image)


async def test_an_answer_by_address_is_json(client: httpx2.AsyncClient):
    for headers in ({}, KEY):
        wanted = headers | {"accept": "image/png"}
        answer = await client.post("/v1/generate", json=BODY | {"response": "url"}, headers=wanted)
        refused(answer, 422, "response")


@pytest.fixture
def small() -> str:
    return base64.b64encode(PNG).decode()


async def test_a_job_that_enlarges_has_a_receipt(client: httpx2.AsyncClient):
    body = {"image": base64.b64encode(PNG).decode(), "scale": 2.0, "async": True}
    done = await finished(client, (await client.post("/v1/upscale", json=body)).json()["job_id"])
    receipt = (await client.get(f"/v1/receipts/{done['result']['receipt_id']}")).json()
    assert receipt["images"][0]["sha256"] == done["result"]["images"][0]["sha256"]
    at_once = await client.post("/v1/upscale", json=body | {"async": False}, headers=KEY | {"accept": "image/png"})
    assert (await client.get(f"/v1/receipts/{at_once.headers['x-receipt-id']}")).status_code == 200
