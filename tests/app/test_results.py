"""Cached answers, addresses, receipts and replays over HTTP: a real database, a real folder, a router in memory."""

import asyncio
import base64
import hashlib
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update

from app import ingress
from app.auth import Guard
from app.database import Database
from app.job_runner import drawing
from app.jobs.making import DrawEvent, Drawn
from app.keys import registry
from app.keys.caller import ANONYMOUS, Limits, current
from app.replay import replay
from app.results import results as kept
from app.results.table import results as table
from app.service import Service
from app.settings import FolderSettings, GatewaySettings
from models.errors import GenerationFailed, InvalidRequest, NotFound, Unavailable
from models.events import Finished
from models.images import Picture, encode
from models.request import GenerationRequest
from tests.app.conftest import ADAPTERS, CARDS, UPSCALER, MemoryRouter
from tests.app.loopback import until
from tests.app.results.conftest import blank_file

__all__ = ["blank_file"]

BODY = {"prompt": "a red circle", "seed": 7, "steps": 2}
WHITE = encode(Picture(width=64, height=64, data=b"\xff" * (3 * 64 * 64)).array(), "png")


@pytest.fixture
def settings(tmp_path: Path, blank_file: Path) -> GatewaySettings:
    return GatewaySettings(
        database=f"sqlite:///{shutil.copy(blank_file, tmp_path / 'heliograph.db')}",
        secret_file=str(tmp_path / "secret"),
        store=FolderSettings(path=str(tmp_path / "pictures")),
    )


@pytest.fixture
async def database(settings: GatewaySettings) -> AsyncIterator[Database]:
    database = Database(settings.database)
    yield database
    await database.close()


@pytest.fixture
def service(router: MemoryRouter, settings: GatewaySettings, database: Database) -> Service:
    service = Service(router, None, kept.opened(settings, database))
    service.offer(CARDS, "sd15", lambda: ADAPTERS, UPSCALER)
    return service


@pytest.fixture
async def client(service: Service, settings: GatewaySettings) -> AsyncIterator[httpx2.AsyncClient]:
    async def ready() -> None:
        return None

    app = ingress.build(service, settings, ready)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def draw(client: httpx2.AsyncClient, **body: Any) -> httpx2.Response:
    answer = await client.post("/v1/generate", json=BODY | body)
    assert answer.status_code == 200, answer.text
    return answer


def marks(answer: httpx2.Response) -> tuple[str, bool]:
    return answer.headers["x-cache"], answer.json()["cached"]


async def test_the_same_request_is_answered_from_the_cache_and_marked(client: httpx2.AsyncClient, router: MemoryRouter):
    first, second = await draw(client), await draw(client)
    assert (marks(first), marks(second)) == (("miss", False), ("hit", True))
    same = ("images", "parameters", "prompts", "revision", "receipt_id", "warnings")
    assert [first.json()[name] for name in same] == [second.json()[name] for name in same]
    assert first.json()["id"] != second.json()["id"]
    assert len(router.requests) == 1


@pytest.mark.parametrize(
    "body", [{"cache": False}, {"seed": None}, {"steps": 3}, {"upscale": {"model": "2x"}}, {"model": "sdxl"}]
)
async def test_what_is_not_the_same_request_is_drawn(
    client: httpx2.AsyncClient, router: MemoryRouter, body: dict[str, Any]
):
    await draw(client)
    for _ in range(1 if "steps" in body or "model" in body else 2):
        drawn = len(router.requests)
        assert marks(await draw(client, **body)) == ("miss", False)
        assert len(router.requests) == drawn + 1


async def test_other_weights_draw_anew(client: httpx2.AsyncClient, router: MemoryRouter):
    await draw(client)
    router.drawn_from = replace(router.drawn_from, revision="def")
    assert marks(await draw(client)) == ("miss", False)
    assert marks(await draw(client)) == ("hit", True)


async def test_a_model_that_sleeps_draws_anew(client: httpx2.AsyncClient, router: MemoryRouter):
    await draw(client)
    router.states["sd15"] = "cold"
    assert marks(await draw(client)) == ("miss", False)


async def test_a_picture_that_has_gone_is_drawn_anew(client: httpx2.AsyncClient, tmp_path: Path):
    await draw(client)
    shutil.rmtree(tmp_path / "pictures" / "results")
    assert marks(await draw(client)) == ("miss", False)
    assert marks(await draw(client)) == ("hit", True)


async def test_a_herd_of_fifty_is_drawn_once(client: httpx2.AsyncClient, router: MemoryRouter):
    router.gate.clear()
    herd = [asyncio.create_task(draw(client)) for _ in range(50)]
    await asyncio.sleep(0.3)
    router.gate.set()
    answers = await asyncio.gather(*herd)
    assert len(router.requests) == 1
    assert sorted(marks(answer) for answer in answers) == [("hit", True)] * 49 + [("miss", False)]
    assert len({answer.json()["receipt_id"] for answer in answers}) == 1
    assert len({answer.json()["id"] for answer in answers}) == 50


async def test_who_goes_away_does_not_take_the_others_along(client: httpx2.AsyncClient, router: MemoryRouter):
    router.gate.clear()
    first, *others = [asyncio.create_task(draw(client)) for _ in range(4)]
    await asyncio.sleep(0.2)
    first.cancel()
    await asyncio.sleep(0.2)
    router.gate.set()
    assert {answer.status_code for answer in await asyncio.gather(*others)} == {200}
    assert len(router.requests) == 2


async def test_who_fails_does_not_take_the_others_along(client: httpx2.AsyncClient, router: MemoryRouter):
    router.failure = GenerationFailed("engine_fault")
    herd = [asyncio.create_task(client.post("/v1/generate", json=BODY)) for _ in range(3)]
    assert {answer.status_code for answer in await asyncio.gather(*herd)} == {503}
    assert len(router.requests) == 3
    router.failure = None
    assert marks(await draw(client)) == ("miss", False)


async def test_callers_do_not_share_pictures_receipts_or_flights(service: Service, router: MemoryRouter):
    request = GenerationRequest(model="sd15", prompt="x", seed=7)
    router.gate.clear()

    async def as_caller(id: str) -> Any:
        current.set(replace(ANONYMOUS, id=id))
        return await service.generate(request)

    both = [asyncio.create_task(as_caller(id)) for id in ("ada", "eve")]
    await asyncio.sleep(0.2)
    router.gate.set()
    ada, eve = await asyncio.gather(*both)
    assert not ada.cached
    assert not eve.cached
    assert len(router.requests) == 2
    assert (await as_caller("eve")).receipt_id == eve.receipt_id != ada.receipt_id


async def test_addresses_in_place_of_base64_lead_to_the_picture(client: httpx2.AsyncClient):
    plain = base64.b64decode((await draw(client)).json()["images"][0]["base64"])
    for seed in (7, None):  # found, and drawn
        [image] = (await draw(client, seed=seed, response="url")).json()["images"]
        assert "base64" not in image
        picture = await client.get(image["url"])
        assert picture.status_code == 200
        assert hashlib.sha256(picture.content).hexdigest() == image["sha256"]
        assert (picture.content == plain) == (seed == 7)


@pytest.mark.parametrize(
    ("body", "accept"), [({"response": "url"}, "image/png"), ({"response": "url", "stream": True}, "*/*")]
)
async def test_an_address_is_refused_where_there_is_no_place_for_it(
    client: httpx2.AsyncClient, router: MemoryRouter, body: dict[str, Any], accept: str
):
    answer = await client.post("/v1/generate", json=BODY | body, headers={"accept": accept})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "response")
    assert not router.requests


async def test_a_picture_alone_has_its_marks_in_headers(client: httpx2.AsyncClient):
    asked = {"json": BODY, "headers": {"accept": "image/png"}}
    first, second = [await client.post("/v1/generate", **asked) for _ in range(2)]
    assert [answer.headers["x-cache"] for answer in (first, second)] == ["miss", "hit"]
    assert first.content == second.content
    assert first.headers["x-receipt-id"] == second.headers["x-receipt-id"]


async def test_a_stream_finds_what_is_kept_and_is_kept(client: httpx2.AsyncClient, router: MemoryRouter):
    drawn = (await client.post("/v1/generate", json=BODY | {"stream": True})).text
    again = (await client.post("/v1/generate", json=BODY | {"stream": True})).text
    assert [line for line in drawn.splitlines() if line.startswith("event")] == [
        "event: queued", "event: progress", "event: image", "event: done"
    ]  # fmt: skip
    assert [line for line in again.splitlines() if line.startswith("event")] == [
        "event: queued", "event: image", "event: done"
    ]  # fmt: skip
    assert marks(await draw(client)) == ("hit", True)
    assert len(router.requests) == 1


async def test_another_callers_receipt_is_404_like_one_that_never_was(service: Service, settings: GatewaySettings):
    async def ready() -> None:
        return None

    database = Database(settings.database)
    keys = registry.opened(database, settings.secret_file)
    app = ingress.build(service, settings, ready, Guard("keys", keys))
    texts = [(await keys.create(name, ("generate",), Limits()))[1] for name in ("ada", "eve")]
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        ada, eve = ({"x-api-key": text} for text in texts)
        id = (await client.post("/v1/generate", json=BODY, headers=ada)).json()["receipt_id"]
        assert (await client.get(f"/v1/receipts/{id}", headers=ada)).status_code == 200
        for receipt_id in (id, "0" * 32):
            got = await client.get(f"/v1/receipts/{receipt_id}", headers=eve)
            replayed = await client.post("/v1/replay", json={"receipt_id": receipt_id}, headers=eve)
            assert (got.status_code, replayed.status_code) == (404, 404)
            assert got.json() == replayed.json()
        hers = await client.post("/v1/generate", json=BODY, headers=eve)
        assert marks(hers) == ("miss", False)
    await database.close()


async def test_an_enlarged_picture_comes_by_address_and_is_not_replayed(client: httpx2.AsyncClient):
    asked = {"image": base64.b64encode(WHITE).decode(), "scale": 2.0, "response": "url"}
    [image] = (await client.post("/v1/upscale", json=asked)).json()["images"]
    picture = await client.get(image["url"])
    assert hashlib.sha256(picture.content).hexdigest() == image["sha256"]
    receipt_id = image["url"].split("/")[4]
    assert (await client.get(f"/v1/receipts/{receipt_id}")).json()["request"]["scale"] == 2.0
    replay = await client.post("/v1/replay", json={"receipt_id": receipt_id})
    assert (replay.status_code, replay.json()["error"]["field"]) == (422, "receipt_id")


async def test_a_receipt_is_its_owners_and_leads_to_the_pictures(client: httpx2.AsyncClient, service: Service):
    id = (await draw(client)).json()["receipt_id"]
    receipt = (await client.get(f"/v1/receipts/{id}")).json()
    assert receipt["request"]["prompt"] == "a red circle"
    picture = await client.get(receipt["images"][0]["url"])
    assert hashlib.sha256(picture.content).hexdigest() == receipt["images"][0]["sha256"]
    for unknown in ("0" * 32, "..", "x" * 5000):
        answer = await client.get(f"/v1/receipts/{unknown}")
        assert answer.status_code == 404
    results = service.results
    with pytest.raises(NotFound):
        await results.get("eve", id)


@pytest.mark.parametrize(
    "body", [{}, {"seed": None, "samples": 2}, {"image": base64.b64encode(WHITE).decode(), "output_format": "jpeg"}]
)
async def test_a_replay_is_identical(client: httpx2.AsyncClient, router: MemoryRouter, body: dict[str, Any]):
    first = (await draw(client, **body)).json()
    answer = await client.post("/v1/replay", json={"receipt_id": first["receipt_id"]})
    assert answer.status_code == 200, answer.text
    replay = answer.json()
    assert (replay["identical"], replay["max_difference"], replay["changed"]) == (True, 0, [])
    assert [image["base64"] for image in replay["images"]] == [image["base64"] for image in first["images"]]
    assert len(router.requests) == 2
    assert router.requests[0] == replace(router.requests[1], deadline_s=None)


async def test_a_replay_that_differs_says_by_how_much_and_what_has_changed(
    client: httpx2.AsyncClient, router: MemoryRouter
):
    id = (await draw(client)).json()["receipt_id"]
    unseeded = (await draw(client, seed=None)).json()["receipt_id"]
    router.packed = lambda _: encode(Picture(width=128, height=128, data=b"\xff" * (3 * 128 * 128)).array(), "png")
    router.drawn_from = replace(router.drawn_from, versions={"torch": "3"}, adapters={"lora:moon": "ab"})
    replay = (await client.post("/v1/replay", json={"receipt_id": id})).json()
    assert (replay["identical"], replay["max_difference"]) == (False, 248)
    assert replay["changed"] == ["adapters.lora:moon", "versions.torch"]
    replay = (await client.post("/v1/replay", json={"receipt_id": unseeded})).json()
    assert (replay["identical"], replay["max_difference"]) == (False, None)  # the first one was not stored


async def test_a_replay_of_nothing_is_404(client: httpx2.AsyncClient):
    answer = await client.post("/v1/replay", json={"receipt_id": "0" * 32})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_a_store_that_is_away_costs_the_address_and_not_the_picture(client: httpx2.AsyncClient, tmp_path: Path):
    (tmp_path / "pictures" / "results").write_text("a file where a folder is to be made")
    answer = (await draw(client)).json()
    assert answer["images"][0]["base64"]
    assert "not kept" in answer["warnings"][0]
    assert answer["receipt_id"] is not None
    refused = await client.post("/v1/generate", json=BODY | {"response": "url"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")


async def test_a_database_that_is_away_costs_the_receipt_and_not_the_picture(
    router: MemoryRouter, settings: GatewaySettings
):
    database = Database("postgresql://nobody@127.0.0.1:1/nothing")
    service = Service(router, None, kept.opened(settings, database))
    service.offer(CARDS, "sd15")
    request = GenerationRequest(model="sd15", prompt="x", seed=7)
    result = await service.generate(request)
    assert result.images[0].data
    assert result.receipt_id is None
    assert "not kept" in result.warnings[0]
    with pytest.raises(Unavailable):
        await service.urls(await service.generate(request, urls=True))
    await database.close()


async def test_without_a_store_there_is_no_cache_and_no_address(router: MemoryRouter, settings: GatewaySettings):
    database = Database(settings.database)
    service = Service(router, None, kept.opened(settings.model_copy(update={"store": None}), database))
    service.offer(CARDS, "sd15")
    request = GenerationRequest(model="sd15", prompt="x", seed=7)
    first, second = [await service.generate(request) for _ in range(2)]
    assert (first.cached, second.cached, len(router.requests)) == (False, False, 2)
    with pytest.raises(InvalidRequest, match="keeps no pictures"):
        service.check_urls()
    assert first.receipt_id is not None
    again = await replay(service, ANONYMOUS.id, first.receipt_id)
    assert [one.identical for one in again.images] == [True]
    await database.close()


async def accepted(client: httpx2.AsyncClient, router: MemoryRouter, **body: Any) -> dict[str, Any]:
    """The answer to a request that is accepted before it has told of any step."""
    router.gate.clear()
    asking = asyncio.create_task(draw(client, **body))
    await until(lambda: router.running)
    [id] = router.running
    assert (await client.post(f"/v1/requests/{id}/accept")).status_code == 202
    return (await asking).json()


async def test_what_is_accepted_before_its_first_step_is_not_given_for_the_whole(
    client: httpx2.AsyncClient, router: MemoryRouter
):
    early = await accepted(client, router)
    assert early["parameters"]["stop_at_step"] == early["images"][0]["stop_at_step"] == 1
    receipt = (await client.get(f"/v1/receipts/{early['receipt_id']}")).json()
    assert receipt["request"]["stop_at_step"] == 1
    whole = await draw(client)
    assert marks(whole) == ("miss", False)
    assert "stop_at_step" not in whole.json()["parameters"]
    assert "stop_at_step" not in whole.json()["images"][0]
    assert (await client.post("/v1/replay", json={"receipt_id": early["receipt_id"]})).json()["identical"]
    assert router.requests[-1].stop_at_step == 1


async def test_of_pictures_ended_at_different_steps_each_says_its_own_and_none_is_given_again(
    client: httpx2.AsyncClient, router: MemoryRouter
):
    router.whole = 1
    early = await accepted(client, router, samples=2)
    assert [image.get("stop_at_step") for image in early["images"]] == [None, 1]
    assert "stop_at_step" not in early["parameters"]
    receipt = (await client.get(f"/v1/receipts/{early['receipt_id']}")).json()
    assert [image.get("stop_at_step") for image in receipt["images"]] == [None, 1]
    replay = await client.post("/v1/replay", json={"receipt_id": early["receipt_id"]})
    assert (replay.status_code, replay.json()["error"]["field"]) == (422, "receipt_id")
    assert marks(await draw(client, samples=2)) == ("miss", False)


async def test_what_is_ended_early_is_shared_with_nobody(client: httpx2.AsyncClient, router: MemoryRouter):
    router.gate.clear()
    herd = [asyncio.create_task(draw(client)) for _ in range(3)]
    await until(lambda: router.running)
    [id] = router.running
    await client.post(f"/v1/requests/{id}/accept")
    answers = [answer.json() for answer in await asyncio.gather(*herd)]
    assert [answer["images"][0].get("stop_at_step") for answer in answers] == [1, None, None]
    assert len(router.requests) == 2


async def test_who_joins_has_parameters_of_their_own_and_an_address(client: httpx2.AsyncClient, router: MemoryRouter):
    router.gate.clear()
    first = asyncio.create_task(draw(client, deadline_s=60))
    await until(lambda: router.running)
    second = asyncio.create_task(draw(client, priority="batch", deadline_s=90, response="url"))
    await asyncio.sleep(0.1)
    router.gate.set()
    told = [(await asking).json() for asking in (first, second)]
    assert [answer["parameters"]["deadline_s"] for answer in told] == [60, 90]
    assert [answer["parameters"]["priority"] for answer in told] == ["interactive", "batch"]
    assert [answer["cached"] for answer in told] == [False, True]
    assert (await client.get(told[1]["images"][0]["url"])).status_code == 200
    assert len(router.requests) == 1
    assert router.requests[0].deadline_s < 60  # what was left of it


async def test_who_waits_for_another_waits_no_longer_than_the_server_lets_a_request_take(
    router: MemoryRouter, settings: GatewaySettings
):
    service = Service(router, patience_s=0.05)
    service.offer(CARDS, "sd15")
    request = GenerationRequest(model="sd15", prompt="x", seed=7)
    router.gate.clear()
    leading = asyncio.create_task(service.generate(request))
    await until(lambda: router.running)
    with pytest.raises(GenerationFailed, match="in time"):
        await service.generate(request)
    router.gate.set()
    assert (await leading).images


async def test_a_runners_equal_jobs_are_drawn_once(service: Service, router: MemoryRouter):
    router.gate.clear()
    request = GenerationRequest(model="sd15", prompt="x", seed=7).resolve(CARDS["sd15"])

    async def job(cache: bool = True) -> list[DrawEvent]:
        return [event async for event in drawing(service)(request, cache)]

    herd = [asyncio.create_task(job()) for _ in range(5)]
    alone = asyncio.create_task(job(cache=False))
    await asyncio.sleep(0.2)
    router.gate.set()
    ends = [events[-1] for events in await asyncio.gather(*herd, alone)]
    assert sorted(end.cached for end in ends if isinstance(end, Drawn)) == [False] * 2 + [True] * 4
    assert len(router.requests) == 2
    pictures = [event.data for task in herd for event in task.result() if isinstance(event, Finished)]
    assert pictures == [pictures[0]] * 5


async def test_a_receipt_of_another_version_is_a_miss_and_no_replay(
    client: httpx2.AsyncClient, router: MemoryRouter, database: Database
):
    for name, part in (("prompts", {"prompt": {"words": 3}}), ("request", {"hires": {"fashion": 1}})):
        id = (await draw(client)).json()["receipt_id"]
        row = await database.read(lambda c, id=id: c.scalar(select(table.c.receipt).where(table.c.id == id)))
        other = update(table).where(table.c.id == id).values(receipt=row | {name: row[name] | part})
        await database.write(lambda c, other=other: c.execute(other))
        if name == "prompts":
            assert marks(await draw(client)) == ("miss", False)
        else:
            replay = await client.post("/v1/replay", json={"receipt_id": id})
            assert (replay.status_code, replay.json()["error"]["field"]) == (422, "receipt_id")


async def test_a_file_that_is_not_what_was_kept_is_a_miss_and_nothing_to_compare_with(
    client: httpx2.AsyncClient, router: MemoryRouter, tmp_path: Path
):
    first = (await draw(client)).json()
    [file] = (tmp_path / "pictures" / "results").rglob("*.png")
    file.write_bytes(file.read_bytes()[:-20] + b"\0" * 20)
    router.packed = lambda _: encode(Picture(width=128, height=128, data=b"\xff" * (3 * 128 * 128)).array(), "png")
    replay = (await client.post("/v1/replay", json={"receipt_id": first["receipt_id"]})).json()
    assert (replay["identical"], replay["max_difference"]) == (False, None)
    assert marks(await draw(client)) == ("miss", False)
    assert marks(await draw(client)) == ("hit", True)


async def test_what_an_address_would_outlive_is_drawn_anew(client: httpx2.AsyncClient, database: Database):
    id = (await draw(client)).json()["receipt_id"]
    soon = update(table).where(table.c.id == id).values(expires_at=time.time() + 3590)
    await database.write(lambda c: c.execute(soon))
    assert marks(await draw(client, response="url")) == ("miss", False)


async def test_a_picture_that_goes_before_its_address_is_given_is_asked_for_again(service: Service, tmp_path: Path):
    result = await service.generate(GenerationRequest(model="sd15", prompt="x", seed=7))
    shutil.rmtree(tmp_path / "pictures" / "results")
    with pytest.raises(Unavailable, match="send the request again"):
        await service.urls(result)
    with pytest.raises(Unavailable, match="not stored"):
        await service.urls(replace(result, keys=()))


async def test_every_enlargement_has_a_receipt(client: httpx2.AsyncClient):
    asked = {"image": base64.b64encode(WHITE).decode(), "scale": 2.0}
    plain = (await client.post("/v1/upscale", json=asked)).json()
    alone = await client.post("/v1/upscale", json=asked, headers={"accept": "image/png"})
    by_address = (await client.post("/v1/upscale", json=asked | {"response": "url"})).json()
    for id in (plain["receipt_id"], alone.headers["x-receipt-id"], by_address["receipt_id"]):
        receipt = (await client.get(f"/v1/receipts/{id}")).json()
        assert (receipt["request"]["scale"], receipt["model"]) == (2.0, "2x")
        assert receipt["images"][0]["sha256"] == hashlib.sha256(alone.content).hexdigest()
        assert ("url" in receipt["images"][0]) == (id == by_address["receipt_id"])
    assert (plain["warnings"], alone.headers["x-warnings"]) == ([], "0")


async def test_an_enlargement_that_cannot_be_kept_is_given_all_the_same(client: httpx2.AsyncClient, tmp_path: Path):
    (tmp_path / "pictures" / "results").write_text("a file where a folder is to be made")
    asked = {"image": base64.b64encode(WHITE).decode(), "scale": 2.0}
    refused = await client.post("/v1/upscale", json=asked | {"response": "url"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert (await client.post("/v1/upscale", json=asked)).json()["images"][0]["base64"]


async def test_a_replay_with_an_input_picture_needs_a_store_and_says_so(
    router: MemoryRouter, settings: GatewaySettings, database: Database
):
    service = Service(router, None, kept.opened(settings.model_copy(update={"store": None}), database))
    service.offer(CARDS, "sd15")
    image = Picture.from_bytes(WHITE)
    first = await service.generate(GenerationRequest(model="sd15", prompt="x", seed=7, image=image))
    assert first.receipt_id is not None
    with pytest.raises(InvalidRequest, match="not kept"):
        await replay(service, ANONYMOUS.id, first.receipt_id)
