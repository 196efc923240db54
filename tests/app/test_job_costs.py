"""What jobs cost their callers, and what is given back or put away again where no job came of a request."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.database import Database
from app.jobs import inputs
from app.jobs.service import Delivery, Jobs
from app.jobs.store import JobStore
from app.keys.budgets import Budgets
from app.keys.caller import Caller, Limits, current
from app.metered import Metered
from app.stores.folder import Folder
from app.stores.links import Links
from app.stores.store import StorageFull, StoredObject
from models.errors import GenerationFailed, Overloaded, Unavailable
from models.images import Picture
from models.request import GenerationRequest
from tests.app.conftest import CARDS, MemoryRouter
from tests.app.test_jobs import DRAW, PNG, House, opened, refused

COST = 128 * 128 * 2  # of DRAW
FORM: dict[str, Any] = {"files": {"image": PNG}, "data": {"prompt": "x", "steps": "2", "async": "true"}}
SMALL = 64 * 64 * 2  # of FORM
AT_ONCE = DRAW | {"async": False}


@pytest.fixture
async def house(tmp_path: Path, router: MemoryRouter) -> AsyncIterator[House]:
    async for house in opened(tmp_path, router, keyed=True):
        yield house


async def caller(house: House, pixel_steps: int) -> httpx2.AsyncClient:
    """A client with so many pixel-steps a minute."""
    limits = Limits(pixel_steps_per_minute=pixel_steps)
    return house.client((await house.keys.create("painter", ("generate", "jobs"), limits))[1])


def stored(house: House) -> int:
    """How many input pictures lie in the store."""
    return sum(1 for _ in (house.folder / "pictures").glob("inputs/*/*.object"))


def spent(answer: httpx2.Response) -> bool:
    return (answer.status_code, answer.json().get("error", {}).get("code")) == (429, "budget_spent")


async def test_a_job_costs_its_caller_pixel_steps_when_it_is_submitted(house: House):
    async with await caller(house, COST) as client:
        answers = [await client.post("/v1/generate", json=DRAW) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 429]


async def test_a_second_try_costs_what_the_first_did_and_its_replay_nothing(house: House):
    headers = {"idempotency-key": "again"}
    async with await caller(house, 2 * COST) as client:
        id = (await client.post("/v1/generate", json=DRAW)).json()["job_id"]
        await client.post(f"/v1/jobs/{id}/cancel")
        retries = [await client.post(f"/v1/jobs/{id}/retry", headers=headers) for _ in range(3)]
        assert [retry.status_code for retry in retries] == [202] * 3
        assert len({retry.json()["job_id"] for retry in retries}) == 1
        assert spent(await client.post(f"/v1/jobs/{id}/retry"))
        assert len((await client.get("/v1/jobs")).json()["jobs"]) == 2


async def test_a_second_try_that_is_refused_costs_nothing(house: House):
    async with await caller(house, 2 * COST) as client:
        id = (await client.post("/v1/generate", json=DRAW)).json()["job_id"]
        for _ in range(3):
            refused(await client.post(f"/v1/jobs/{id}/retry"), 422, "id")


async def test_enlarging_again_costs_nothing(house: House):
    async with await caller(house, 1) as client:
        id = (await client.post("/v1/upscale", files={"image": PNG}, data={"async": "true"})).json()["job_id"]
        await client.post(f"/v1/jobs/{id}/cancel")
        assert (await client.post(f"/v1/jobs/{id}/retry")).status_code == 202


async def test_a_key_that_is_sent_twice_at_once_is_paid_and_stored_once(house: House):
    headers = {"idempotency-key": "once"}
    async with await caller(house, 5 * SMALL) as client:
        answers = await asyncio.gather(*(client.post("/v1/img2img", **FORM, headers=headers) for _ in range(5)))
        assert [answer.status_code for answer in answers] == [202] * 5
        assert stored(house) == 1
        rest = [await client.post("/v1/img2img", **FORM) for _ in range(5)]
    assert [answer.status_code for answer in rest] == [202] * 4 + [429]


async def test_a_full_queue_costs_nothing_and_takes_no_pictures(house: House):
    async with await caller(house, 10 * COST + SMALL) as client:
        ids = [(await client.post("/v1/generate", json=DRAW)).json()["job_id"] for _ in range(9)]
        together = await asyncio.gather(*(client.post("/v1/img2img", **FORM) for _ in range(3)))
        assert sorted(answer.status_code for answer in together) == [202, 429, 429]
        assert stored(house) == 1
        bodies: dict[str, dict[str, Any]] = {
            "generate": {"json": DRAW},
            "img2img": FORM,
            "upscale": FORM | {"data": {"async": "true"}},
        }
        for path, body in bodies.items():
            answer = await client.post(f"/v1/{path}", **body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert stored(house) == 1
        await client.post(f"/v1/jobs/{ids[0]}/cancel")
        assert (await client.post("/v1/generate", json=DRAW)).status_code == 202


async def test_what_cannot_be_stored_costs_nothing(house: House):
    (house.folder / "pictures" / "inputs").touch()  # where a folder should be
    async with await caller(house, SMALL) as client:
        for _ in range(2):
            assert (await client.post("/v1/img2img", **FORM)).status_code == 503
        (house.folder / "pictures" / "inputs").unlink()
        assert (await client.post("/v1/img2img", **FORM)).status_code == 202


async def test_a_job_that_the_database_does_not_take_costs_nothing(tmp_path: Path, router: MemoryRouter):
    metered = Metered(router, Budgets())
    database, pictures = Database(f"sqlite:///{tmp_path / 'jobs.db'}"), Folder(tmp_path / "pictures", Links(b"s" * 32))
    jobs = Jobs(JobStore(database), pictures, metered.charge, lambda url, field: None)
    limits = Limits(pixel_steps_per_minute=COST)
    current.set(Caller(id="a", name="a", scopes=frozenset(), limits=limits))
    request = GenerationRequest(model="sd15", prompt="x", steps=2).resolve(CARDS["sd15"])
    await database.close()
    for _ in range(2):
        with pytest.raises(Unavailable):
            await jobs.submit("generate", request, Delivery())


async def test_the_pictures_before_one_that_there_was_no_room_for_are_put_away(tmp_path: Path):
    class Full(Folder):
        async def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
            if key.endswith("/2"):
                raise StorageFull
            return await super().put(key, data, content_type)

    store = Full(tmp_path, Links(b"s" * 32))
    pictures = [Picture(width=8, height=8, data=bytes([n]) * 192) for n in range(3)]
    with pytest.raises(StorageFull):
        await inputs.keep(store, inputs.new_folder(), pictures)
    assert [key async for key in store.list(-60.0)] == []


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_model_refuses_costs_nothing_and_what_it_begins_is_paid(
    house: House, router: MemoryRouter, stream: bool
):
    async with await caller(house, COST) as client:
        router.refusal = Overloaded(1.0, "too much waits")
        for _ in range(2):
            answer = await client.post("/v1/generate", json=AT_ONCE | {"stream": stream})
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        router.refusal, router.failure = None, GenerationFailed("nan_latents", "not a number")
        answer = await client.post("/v1/generate", json=AT_ONCE | {"stream": stream})
        assert "nan_latents" in answer.text
        assert spent(await client.post("/v1/generate", json=AT_ONCE | {"stream": stream}))
