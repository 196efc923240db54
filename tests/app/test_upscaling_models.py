"""Models that make pictures larger, over HTTP: on a service in memory, and with a replica that runs a small one."""

import base64
import io
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from app import ingress
from app.adapters import Shelf
from app.events import ReplicaEvent
from app.replica import Model
from app.service import Service
from app.settings import CatalogueSettings, GatewaySettings, ModelSettings
from models import metadata
from models.card import ModelCard
from models.images import Picture, encode
from models.request import EffectiveRequest
from tests.app.conftest import ADAPTERS, CARDS, UPSCALER, MemoryRouter
from tests.models.upscaling_models import save

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PNG = encode(PIXELS, "png")
BASE64 = base64.b64encode(PNG).decode()
LARGER = base64.b64encode(encode(np.zeros((32, 40, 3), np.uint8), "png")).decode()
FILE = {"image": ("in.png", PNG, "image/png")}
X4 = ModelCard.read("x4", "sd_x4", "someone/x4", {"width": 512, "max_pixels": 256 * 256})
X2 = ModelCard.read("x2", "sd_x2", "someone/x2", {"width": 1024})


@pytest.fixture
def service(router: MemoryRouter) -> Service:
    router.states |= {"x4": "ready", "x2": "ready"}
    service = Service(router)
    service.offer(CARDS | {"x4": X4, "x2": X2}, "sd15", lambda: ADAPTERS, UPSCALER)
    return service


def look_at(data: bytes) -> tuple[str | None, tuple[int, int]]:
    with Image.open(io.BytesIO(data)) as image:
        return image.format, image.size


@pytest.mark.parametrize(
    "sent",
    [
        {"json": {"image": BASE64, "model": "x4", "prompt": "a ring", "noise_level": 50, "steps": 9, "seed": 7}},
        {
            "files": FILE,
            "data": {"model": "x4", "prompt": "a ring", "noise_level": "50", "steps": "9", "seed": "7", "scale": "4"},
        },
    ],
    ids=["json", "form"],
)
async def test_a_model_is_asked_for_a_larger_picture(
    client: httpx2.AsyncClient, router: MemoryRouter, sent: dict[str, Any]
):
    answer = await client.post("/v1/upscale", **sent)
    assert answer.status_code == 200, answer.text
    values = answer.json()
    [image] = values["images"]
    assert look_at(base64.b64decode(image["base64"])) == ("PNG", (120, 80))
    assert (values["model"], image["seed"], values["revision"]) == ("x4", 7, "abc")
    told = values["parameters"]
    assert (told["task"], told["noise_level"], told["steps"], told["prompt"]) == ("upscale", 50, 9, "a ring")
    assert (told["image"], told["width"], told["height"]) == ({"width": 30, "height": 20}, 120, 80)
    assert "denoise_strength" not in told
    assert router.requests[-1].image == Picture.from_array(PIXELS)
    assert not router.upscales


async def test_what_is_left_out_is_the_models_own(client: httpx2.AsyncClient, router: MemoryRouter):
    answer = await client.post("/v1/upscale", files=FILE, data={"model": "x4"}, headers={"Accept": "image/webp"})
    assert look_at(answer.content) == ("WEBP", (120, 80))
    assert (answer.headers["x-model"], answer.headers["x-size"], answer.headers["x-steps"]) == ("x4", "120x80", "75")
    [request] = [request for request in router.requests if request.model == "x4"]
    assert (request.prompt, request.noise_level, request.guidance_scale, request.sampler) == ("", 20, 9.0, "ddim")


async def test_every_endpoint_that_takes_a_picture_takes_such_a_model(client: httpx2.AsyncClient, router: MemoryRouter):
    for path in ("/v1/generate", "/v1/img2img"):
        answer = await client.post(path, json={"prompt": "", "model": "x4", "image": BASE64, "noise_level": 3})
        assert answer.status_code == 200, answer.text
        assert (router.requests[-1].task, router.requests[-1].noise_level) == ("upscale", 3)


@pytest.mark.parametrize(
    ("path", "body", "status", "field", "word"),
    [
        ("generate", {"prompt": "x", "model": "x4"}, 422, "image", "is required: x4 makes pictures larger"),
        ("generate", {"prompt": "x", "noise_level": 3}, 422, "noise_level", "txt2img, img2img, inpaint, not upscale"),
        ("inpaint", {"prompt": "x", "model": "x4", "image": BASE64, "mask": BASE64}, 422, "mask", "does upscale"),
        ("generate", {"prompt": "x", "upscale": {"model": "x4"}}, 422, "upscale.model", "lanczos, 2x; x4 draws"),
        ("generate", {"prompt": "x", "upscale": {"model": "nope"}}, 404, None, "lanczos, 2x, x4, x2"),
        ("upscale", {"image": BASE64, "model": "nope"}, 404, None, "lanczos, 2x, x4, x2"),
        ("upscale", {"image": BASE64, "model": "sd15"}, 404, None, "lanczos, 2x, x4, x2"),
        ("upscale", {"image": BASE64, "model": "x4", "scale": 2}, 422, "scale", "must be left out or 4"),
        ("upscale", {"image": BASE64, "model": "x4", "noise_level": 400}, 422, "noise_level", "between 0 and 350"),
        ("upscale", {"image": LARGER, "model": "x2", "noise_level": 4}, 422, "noise_level", "left out or 0"),
        ("upscale", {"image": BASE64, "model": "x4", "steps": 0}, 422, "steps", "between 1 and 150"),
        ("upscale", {"image": BASE64, "model": "2x", "prompt": "x"}, 422, "prompt", "needs a `model`"),
        ("upscale", {"image": BASE64, "seed": 1}, 422, "seed", "needs a `model`"),
        ("upscale", {"image": "aGk=", "model": "x4"}, 422, "image", ""),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_a_mistake_is_named(
    client: httpx2.AsyncClient, router: MemoryRouter, path: str, body: Any, status: int, field: str | None, word: str
):
    drawn = len(router.requests)
    answer = await client.post(f"/v1/{path}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error.get("field")) == (status, field), answer.text[:300]
    assert word in error["message"]
    assert len(router.requests) == drawn


async def test_a_picture_that_would_become_too_large_is_refused_before_it_is_drawn(
    client: httpx2.AsyncClient, router: MemoryRouter
):
    drawn = len(router.requests)
    large = base64.b64encode(encode(np.zeros((65, 64, 3), np.uint8), "png")).decode()
    answer = await client.post("/v1/upscale", json={"image": large, "model": "x4"})
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (422, "image")
    assert "64x65 becomes 256x260" in error["message"]
    assert len(router.requests) == drawn


async def test_such_models_are_listed_with_what_they_do(client: httpx2.AsyncClient):
    models = {model["id"]: model for model in (await client.get("/v1/models")).json()["data"]}
    assert models["x4"]["tasks"] == ["upscale"]
    assert models["x4"]["upscaling"] == {"scale": 4, "noise_level": 20, "max_input_pixels": 64 * 64}
    assert models["x2"]["upscaling"] == {"scale": 2, "noise_level": None, "max_input_pixels": 1024 * 1024}
    assert models["x4"]["limits"]["max_pixels"] == 256 * 256
    assert "upscaling" not in models["sd15"]
    adapters = (await client.get("/v1/adapters")).json()["data"]
    listed = {entry["name"]: entry["models"] for entry in adapters if entry["kind"] == "upscaler"}
    everybody = ["sd15", "sdxl", "x4", "x2"]
    assert listed == {"lanczos": everybody, "2x": everybody, "x4": ["x4"], "x2": ["x2"]}


async def test_a_server_with_such_a_model_needs_no_upscaler(client: httpx2.AsyncClient, service: Service):
    service.offer(CARDS | {"x4": X4}, "sd15")
    assert (await client.post("/v1/upscale", json={"image": BASE64, "model": "x4"})).status_code == 200
    answer = await client.post("/v1/upscale", json={"image": BASE64})
    assert answer.status_code == 404
    assert "but models that make pictures larger: x4" in answer.json()["error"]["message"]


def test_a_catalogue_has_one_meaning_for_each_name_of_an_upscaler():
    x4 = {"name": "2x", "family": "sd_x4", "source": "someone/x4", "defaults": {"width": 512}}
    upscaler = {"models": {"2x": "2x.safetensors"}}
    with pytest.raises(ValidationError, match="has an upscaler's name: 2x"):
        CatalogueSettings.model_validate({"models": [x4], "default_model": "2x", "upscaler": upscaler})
    with pytest.raises(ValidationError, match="has an upscaler's name: lanczos"):
        CatalogueSettings.model_validate({"models": [x4 | {"name": "lanczos"}], "default_model": "lanczos"})


def test_nothing_that_steers_is_taken_or_listed_for_such_a_model():
    with pytest.raises(ValidationError, match="do not go with the family sd_x4"):
        ModelSettings(name="x4", family="sd_x4", source="someone/x4", controlnets={"canny": "canny"})
    x4 = ModelSettings(name="x4", family="sd_x4", source="someone/x4")
    sd15 = ModelSettings(name="sd15", source="models/embedded/sd15")
    assert {model for adapter in Shelf((x4, sd15))() for model in adapter.models} == {"sd15"}


# With a replica


class Direct(MemoryRouter):
    """The way to one replica that is no Serve replica."""

    def __init__(self, replica: Model):
        super().__init__()
        self._replica = replica
        self.states = {"x4": "ready"}

    async def generate(self, request: EffectiveRequest, progress: bool, id: str) -> AsyncGenerator[ReplicaEvent, None]:
        async with aclosing(self._replica.generate(request, progress, id)) as events:
            async for event in events:
                yield event


@pytest.fixture
async def at_a_replica(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A gateway with one model, a real x4 upscaler of small untrained networks."""
    source = str(save("sd_x4", tmp_path / "x4"))
    limits = {"max_pixels": 256 * 256, "steps": 4}
    settings = ModelSettings(name="x4", family="sd_x4", source=source, threads=1, max_rows=8, defaults=limits)
    replica = Model.__new__(Model)
    await replica.__init__(settings)
    service = Service(Direct(replica))
    service.offer({"x4": settings.card()}, "x4")
    app = ingress.build(service, GatewaySettings(), ingress.Readiness(service).reason)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        yield client


async def test_a_replica_makes_a_picture_larger(at_a_replica: httpx2.AsyncClient):
    body = {"image": BASE64, "model": "x4", "prompt": "a ring", "seed": 3, "noise_level": 40, "metadata": "full"}
    answer = await at_a_replica.post("/v1/upscale", json=body, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    assert look_at(answer.content) == ("PNG", (120, 80))
    told = metadata.read(answer.content)
    assert told.parameters["noise_level"] == 40
    assert "denoise_strength" not in told.parameters
    assert told.warnings[0].startswith("`image` has to be sent again: 30x20")
    again = await at_a_replica.post("/v1/generate", json=told.parameters | {"image": BASE64})
    assert again.status_code == 200, again.text
    [image] = again.json()["images"]
    first, second = (np.asarray(Image.open(io.BytesIO(d))) for d in (answer.content, base64.b64decode(image["base64"])))
    assert np.array_equal(first, second)
    assert first.std() > 10
