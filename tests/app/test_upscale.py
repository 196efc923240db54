"""Enlargement over HTTP on a service in memory, and the replica that does it, with the small networks that ship."""

import asyncio
import base64
import io
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from ray.exceptions import ActorDiedError

from app import deployment
from app.events import Upscaled
from app.replica import Chain
from app.router import UpscalerRoute
from app.settings import UpscalerSettings
from app.upscaler import Upscaler
from models import metadata
from models.errors import GenerationFailed, InvalidRequest, NotFound, Overloaded
from models.events import Failed, Finished, Progress
from models.images import Picture, encode
from models.parts import Hires, Outpaint, Upscale
from models.request import EffectiveRequest, GenerationRequest
from tests.app.conftest import CARDS, TIMINGS, MemoryRouter, claimed
from tests.app.loopback import until
from tests.app.test_settings import SHIPPED

PNG = encode(np.full((20, 30, 3), 120, np.uint8), "png")
BASE64 = base64.b64encode(PNG).decode()
FILE = {"image": ("in.png", PNG, "image/png")}
EMBEDDED = {f"{scale}x": f"models/embedded/upscalers/{scale}x.safetensors" for scale in (2, 4)}


def look_at(data: bytes) -> tuple[str | None, tuple[int, int]]:
    with Image.open(io.BytesIO(data)) as image:
        return image.format, image.size


@pytest.mark.parametrize(
    "sent",
    [
        {"json": {"image": BASE64, "scale": 3, "model": "lanczos", "output_format": "jpg"}},
        {"files": FILE, "data": {"scale": "3", "model": "lanczos", "output_format": "jpg"}},
    ],
    ids=["json", "form"],
)
async def test_a_picture_goes_in_and_a_larger_one_comes_out(
    client: httpx2.AsyncClient, router: MemoryRouter, sent: dict[str, Any]
):
    answer = await client.post("/v1/upscale", **sent)
    assert answer.status_code == 200, answer.text
    values = answer.json()
    [image] = values["images"]
    assert look_at(base64.b64decode(image.pop("base64"))) == ("JPEG", (90, 60))
    assert image == {"index": 0, "format": "jpeg", "width": 90, "height": 60}
    assert (values["model"], values["parameters"]) == ("lanczos", {"scale": 3})
    assert router.upscales == [Upscale(scale=3, model="lanczos")]


async def test_what_is_left_out_is_twice_the_size_by_the_default_upscaler(
    client: httpx2.AsyncClient, router: MemoryRouter
):
    answer = await client.post("/v1/upscale", files=FILE, headers={"Accept": "image/png"})
    assert look_at(answer.content) == ("PNG", (60, 40))
    assert answer.headers["content-type"] == "image/png"
    assert (answer.headers["x-model"], answer.headers["x-size"]) == ("2x", "60x40")
    assert router.upscales == [Upscale(scale=2.0, model="2x")]


async def test_accept_and_format_must_agree(client: httpx2.AsyncClient):
    body = {"image": BASE64, "output_format": "webp"}
    answer = await client.post("/v1/upscale", json=body, headers={"Accept": "image/*"})
    assert look_at(answer.content)[0] == "WEBP"
    answer = await client.post("/v1/upscale", json=body, headers={"Accept": "image/png"})
    assert answer.json()["error"]["field"] == "output_format"
    assert (await client.post("/v1/upscale", json=body, headers={"Accept": "text/html"})).status_code == 406


@pytest.mark.parametrize(
    ("sent", "status", "field", "word"),
    [
        ({"json": {}}, 422, "image", "required"),
        ({"json": {"image": "####"}}, 422, "image", "base64"),
        ({"json": {"image": BASE64, "scale": 9}}, 422, "scale", "between 1.0 and 8.0"),
        ({"json": {"image": BASE64, "scale": "2"}}, 422, "scale", "number"),
        ({"json": {"image": BASE64, "factor": 2}}, 422, "factor", "unknown field"),
        ({"json": {"image": BASE64, "model": "nope"}}, 404, None, "lanczos, 2x"),
        ({"json": {"image": BASE64, "output_format": "gif"}}, 422, "output_format", "png"),
        ({"content": b"{"}, 400, "body", "JSON"),
        ({"files": {"img": FILE["image"]}}, 422, "image", "required"),
        ({"files": {"scale": (None, "2")}}, 422, "image", "required"),
        ({"files": FILE, "data": {"scale": "two"}}, 422, "scale", "JSON"),
        ({"files": FILE, "data": {"scale": "nan"}}, 422, "scale", "JSON"),
        ({"files": FILE, "data": {"factor": "2"}}, 422, "factor", "unknown field"),
        ({"files": [("image", FILE["image"]), ("image", FILE["image"])]}, 422, "image", "more than once"),
        ({"files": [("image", FILE["image"])] * 65}, 413, "body", "parts"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "body", "boundary"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=y"}}, 400, "body", "multipart"),
        ({"files": {"image": ("in.png", b"x" * 200_000)}}, 413, "body", "100000"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_a_mistake_is_named(
    client: httpx2.AsyncClient, sent: dict[str, Any], status: int, field: str | None, word: str
):
    answer = await client.post("/v1/upscale", **sent)
    error = answer.json()["error"]
    assert (answer.status_code, error.get("field")) == (status, field), answer.text[:300]
    assert word in error["message"]


async def test_a_client_that_goes_away_takes_its_picture_along(client: httpx2.AsyncClient, router: MemoryRouter):
    router.gate.clear()
    before = router.left
    asking = asyncio.create_task(client.post("/v1/upscale", files=FILE))
    await until(lambda: router.upscales)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: router.left == before + 1)


async def test_a_full_upscaler_says_when_to_come_back(client: httpx2.AsyncClient, router: MemoryRouter):
    router.refusal = Overloaded(2.3)
    answer = await client.post("/v1/upscale", files=FILE)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


async def test_the_upscalers_are_listed_with_what_else_a_request_may_name(client: httpx2.AsyncClient):
    listed = (await client.get("/v1/adapters")).json()["data"]
    assert [(a["name"], a["models"]) for a in listed if a["kind"] == "upscaler"] == [
        ("lanczos", ["sd15", "sdxl"]),
        ("2x", ["sd15", "sdxl"]),
    ]


async def test_a_server_without_an_upscaler_says_so(client: httpx2.AsyncClient, service: Any):
    service.offer(CARDS, "sd15")
    larger = {"prompt": "x", "upscale": {"scale": 2}}
    for answer in (await client.post("/v1/upscale", files=FILE), await client.post("/v1/generate", json=larger)):
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, "this server has no upscaler")


async def test_a_request_that_cannot_be_enlarged_is_refused_before_it_is_drawn(service: Any, router: MemoryRouter):
    request = GenerationRequest(model="sd15", prompt="x", width=512, height=512)
    drawn = len(router.requests)
    for wanted, error in (
        (Upscale(scale=4), InvalidRequest),
        (Upscale(scale=9), InvalidRequest),
        (Upscale(model="nope"), NotFound),
    ):
        with pytest.raises(error):
            await service.generate(replace(request, upscale=wanted))
    assert len(router.requests) == drawn
    await service.generate(replace(request, upscale=Upscale(scale=2)))
    assert router.requests[-1].upscale == Upscale(scale=2, model="2x")


async def test_an_upscaler_that_does_not_run_is_noticed_before_anything_is_drawn(
    client: httpx2.AsyncClient, router: MemoryRouter
):
    drawn = len(router.requests)
    router.upscaler_fault = GenerationFailed("replica_lost", "the upscaler does not run")
    answer = await client.post("/v1/generate", json={"prompt": "x", "upscale": {}})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert len(router.requests) == drawn
    assert (await client.post("/v1/generate", json={"prompt": "x"})).status_code == 200


PHOTO = Picture(width=1000, height=800, data=bytes(3 * 1000 * 800))
SPOT = replace(PHOTO, data=b"\xff" * len(PHOTO.data))
MASKED = {"image": PHOTO, "mask": SPOT, "mask_region": "masked", "width": 192, "height": 192}


@pytest.mark.parametrize(
    ("fields", "delivered"),
    [
        ({"width": 192, "height": 128}, (192, 128)),
        ({"width": 192, "height": 128, "hires": Hires(scale=2)}, (384, 256)),
        (MASKED, (1000, 800)),
        (MASKED | {"paste_back": False}, (192, 192)),
        ({"image": PHOTO, "mask": SPOT, "width": 192, "height": 192}, (1000, 800)),
        ({"image": PHOTO, "outpaint": Outpaint(left=24, top=64)}, (1024, 864)),
        ({"image": PHOTO, "width": 192, "height": 192}, (192, 192)),
    ],
)
async def test_what_counts_is_the_size_that_is_delivered(
    service: Any, router: MemoryRouter, fields: dict[str, Any], delivered: tuple[int, int]
):
    """The upscaler of these tests gives 1 Mi pixels at most."""
    request = GenerationRequest(model="sd15", prompt="x", **fields)
    assert request.resolve(CARDS["sd15"]).delivered == delivered
    fits = (1024 * 1024 / (delivered[0] * delivered[1])) ** 0.5
    for scale in (1.0, 0.99 * fits):
        if scale >= 1:
            await service.generate(replace(request, upscale=Upscale(scale=scale)))
    drawn = len(router.requests)
    with pytest.raises(InvalidRequest, match="allowed: 1048576 pixels"):
        await service.generate(replace(request, upscale=Upscale(scale=1.01 * fits)))
    assert len(router.requests) == drawn


@pytest.mark.parametrize(
    ("picture", "scale", "format", "field", "word"),
    [
        (claimed(5000, 4000), 1.0, "png", "image", "at most 16777216"),
        (claimed(1000, 1000), 2.0, "png", "scale", "allowed: 1048576"),
        (claimed(30, 20), 2.0, "jpeg", "output_format", "transparency"),
        (b"no picture", 2.0, "png", "image", "PNG"),
    ],
)
async def test_what_a_header_tells_is_refused_before_any_work(
    service: Any, router: MemoryRouter, picture: bytes, scale: float, format: Any, field: str, word: str
):
    with pytest.raises(InvalidRequest, match=word) as refused:
        await service.upscale(picture, Upscale(scale=scale), format)
    assert refused.value.field == field
    assert not router.upscales


async def test_a_transparent_picture_cannot_become_a_jpeg(client: httpx2.AsyncClient, router: MemoryRouter):
    buffer = io.BytesIO()
    Image.new("RGBA", (30, 20), (1, 2, 3, 4)).save(buffer, "PNG")
    files = {"image": ("in.png", buffer.getvalue())}
    answer = await client.post("/v1/upscale", files=files, data={"output_format": "jpg"})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "output_format")
    assert not router.upscales
    assert (await client.post("/v1/upscale", files=files, data={"output_format": "png"})).status_code == 200


async def test_the_time_of_enlarging_is_told_where_there_was_one(client: httpx2.AsyncClient):
    for body, told in (({"upscale": {}}, 0.5), ({}, None)):
        answer = await client.post("/v1/generate", json={"prompt": "x"} | body)
        assert answer.json()["timings"].get("upscale") == told


# The replica


async def new_replica(**options: Any) -> Upscaler:
    replica = Upscaler.__new__(Upscaler)
    await replica.__init__(UpscalerSettings(models=EMBEDDED, default_model="2x", threads=1, tile=128, **options))
    return replica


async def test_a_replica_enlarges_and_refuses_as_a_value():
    replica = await new_replica()
    done = await replica.upscale(PNG, Upscale(scale=2), "webp")
    assert isinstance(done, Upscaled)
    assert look_at(done.data) == ("WEBP", (60, 40))
    assert (done.width, done.height, done.model) == (60, 40, "2x")
    for refused, word in ((b"no picture", "PNG"), (claimed(5000, 4000), "too large")):  # told by the header alone
        failed = await replica.upscale(refused, Upscale(), "png")
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, InvalidRequest)
        assert word in failed.error.message
    replica.check_health()


async def test_a_full_replica_refuses_and_a_caller_who_leaves_makes_room():
    replica = await new_replica(max_waiting=2)
    large = encode(np.zeros((1000, 1000, 3), np.uint8), "png")
    waiting = [asyncio.create_task(replica.upscale(large, Upscale(model="4x"), "png")) for _ in range(3)]
    await asyncio.sleep(0.2)
    refused = await replica.upscale(PNG, Upscale(), "png")
    assert isinstance(refused, Failed)
    assert isinstance(refused.error, Overloaded)
    assert refused.error.retry_after_s > 0
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    done = await asyncio.wait_for(replica.upscale(PNG, Upscale(), "png"), 10)  # far less than the three would take
    assert isinstance(done, Upscaled)


# From a model's replica to the upscaler

REQUEST = GenerationRequest(model="sd15", prompt="x", seed=3, samples=2, output_format="jpeg")
CHAINED = replace(REQUEST, upscale=Upscale(scale=2, model="2x"), metadata="full").resolve(CARDS["sd15"])


class Direct(UpscalerRoute):
    """The way to a replica that is no Serve replica. `faults` come first, one for each attempt."""

    def __init__(self, replica: Upscaler, *faults: Exception):
        super().__init__()
        self._replica, self._faults = replica, list(faults)
        self.asked = 0

    async def _attempt(self, picture: bytes, wanted: Upscale, format: Any, text: Any) -> Upscaled | Failed:
        self.asked += 1
        if self._faults:
            raise self._faults.pop(0)
        return await self._replica.upscale(picture, wanted, format, text)


def finished(index: int) -> Finished:
    picture = {"data": PNG, "format": "png", "width": 30, "height": 20}
    return Finished(index=index, seed=index, revision="r", timings=TIMINGS, **picture)


async def drained(request: EffectiveRequest, route: UpscalerRoute, *events: Any) -> list[Any]:
    queue: asyncio.Queue[Any] = asyncio.Queue()
    chain = Chain(request, queue, route)
    for event in events:
        chain.put(event)
    heard = [await asyncio.wait_for(queue.get(), 20) for _ in events]
    chain.close()
    return heard


async def test_finished_pictures_go_on_to_the_upscaler_and_come_back_larger():
    progress = Progress(index=0, step=1, steps=2, forward=1, rows=2)
    heard = await drained(CHAINED, Direct(await new_replica()), finished(0), progress, finished(1))
    assert heard[0] == progress  # nothing waits for the upscaler
    assert {event.index for event in heard[1:]} == {0, 1}
    for event in heard[1:]:
        assert look_at(event.data) == ("JPEG", (60, 40))
        assert (event.format, event.width, event.height, event.seed) == ("jpeg", 60, 40, event.index)
        assert event.timings.upscale_s > 0
        assert replace(event.timings, upscale_s=None) == TIMINGS
        told = metadata.read(event.data).parameters  # it tells of the picture as it is in the end
        assert told["upscale"] == {"scale": 2, "model": "2x"}
        assert (told["output_format"], told["seed"]) == ("jpeg", 3 + event.index)


async def test_the_engine_draws_png_and_knows_of_no_upscaler():
    chain = Chain(CHAINED, asyncio.Queue(), UpscalerRoute())
    assert (chain.first.output_format, chain.first.upscale, chain.first.metadata) == ("png", None, "none")
    plain = REQUEST.resolve(CARDS["sd15"])
    assert Chain(plain, asyncio.Queue(), UpscalerRoute()).first is plain


async def test_without_upscale_nothing_is_touched():
    assert await drained(REQUEST.resolve(CARDS["sd15"]), UpscalerRoute(), finished(0)) == [finished(0)]


async def test_an_upscaler_that_dies_is_asked_once_more():
    replica = await new_replica()
    [event] = await drained(CHAINED, Direct(replica, ActorDiedError()), finished(0))
    assert isinstance(event, Finished)
    [event] = await drained(CHAINED, Direct(replica, ActorDiedError(), ActorDiedError()), finished(0))
    assert isinstance(event, Failed)
    assert type(event.error) is GenerationFailed  # no death of the request's own, which may be anybody's doing
    assert event.error.reason == "replica_lost"
    [event] = await drained(CHAINED, Direct(replica, ZeroDivisionError("x")), finished(0))
    assert event.error.reason == "engine_fault"  # a fault of ours ends the request too


async def test_a_caller_who_leaves_takes_what_is_under_way_along():
    replica = await new_replica()
    large = replace(finished(0), data=encode(np.zeros((1500, 1500, 3), np.uint8), "png"))
    queue: asyncio.Queue[Any] = asyncio.Queue()
    chain = Chain(CHAINED, queue, Direct(replica))
    chain.put(large)
    await asyncio.sleep(0.2)
    chain.close()
    done = await asyncio.wait_for(replica.upscale(PNG, Upscale(), "png"), 10)
    assert isinstance(done, Upscaled)
    assert queue.empty()


# The configuration


def test_what_ships_runs_and_offers_the_same_upscaler():
    described, _ = deployment.read(SHIPPED)
    assert described.upscaler == described.catalogue.upscaler
    assert described.upscaler is not None
    card = described.upscaler.card()
    assert (card.names, card.default) == (("lanczos", "2x", "4x"), "2x")


@pytest.mark.parametrize(
    "values",
    [
        {"models": {"lanczos": "x.safetensors"}},
        {"default_model": "2x"},
        {"models": {"../2x": "x"}},
        {"tile": 64},
        {"tile": 130},
        {"max_waiting": 0},
        {"scale": 2},
    ],
)
def test_settings_of_the_upscaler_are_checked(values: dict[str, Any]):
    with pytest.raises(ValidationError):
        UpscalerSettings.model_validate(values)
