"""The native API through the whole gateway, on a service in memory: golden conversions, answers, and refusals."""

import asyncio
import base64
import io
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import numpy as np
import pytest
from PIL import Image

from app.dialects import native
from app.dialects.native.answers import from_model, parameters
from app.service import ModelDescription, Service
from models import metadata
from models.errors import InvalidRequest
from models.images import Picture, encode
from models.request import GenerationRequest
from tests.app.conftest import CARDS, MemoryRouter

PNG = encode(np.full((64, 64, 3), 9, np.uint8), "png")


def body(**fields: object) -> native.GenerateBody:
    return native.GenerateBody.model_validate({"prompt": "a red circle"} | fields)


def test_a_prompt_alone_leaves_everything_to_the_model():
    assert native.to_request(body(), "sd15") == GenerationRequest(model="sd15", prompt="a red circle")


def test_every_field_arrives():
    given = {
        "model": "sdxl", "negative_prompt": "blue", "width": 256, "height": 192, "steps": 9, "guidance_scale": 3.5,
        "guidance_rescale": 0.5, "seed": 4, "samples": 2, "sampler": "DPM++ 2M Karras", "schedule": "beta",
        "clip_skip": 1, "deep_cache": 3, "priority": "batch", "deadline_s": 8.0, "denoise_strength": 0.25,
    }  # fmt: skip
    wire = given | {"output_format": "jpg", "image": base64.b64encode(PNG).decode(), "stream": True, "preview_every": 3}
    expected = given | {"output_format": "jpeg", "image": Picture.from_bytes(PNG), "preview_every": 3}
    assert native.to_request(body(**wire), "sd15") == GenerationRequest(prompt="a red circle", **expected)


def test_a_stream_has_previews_unless_told_otherwise():
    assert native.to_request(body(stream=True), "sd15").preview_every == native.STREAM_PREVIEW_EVERY
    assert native.to_request(body(stream=True, preview_every=0), "sd15").preview_every == 0
    with pytest.raises(InvalidRequest, match="preview_every"):
        native.to_request(body(preview_every=2), "sd15")


def test_a_data_uri_is_a_picture_too():
    uri = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert native.to_request(body(image=uri), "sd15").image == Picture.from_bytes(PNG)


async def test_the_json_answer_tells_everything(client: httpx2.AsyncClient):
    request = {"prompt": "truncate me", "samples": 2, "seed": 10, "sampler": "k_euler_a", "model": "sdxl"}
    answer = await client.post("/v1/generate", json=request)
    assert answer.status_code == 200, answer.text
    values = answer.json()
    golden = json.loads((Path(__file__).parent / "native_answer.json").read_text())
    for image in values["images"]:
        picture = Image.open(io.BytesIO(base64.b64decode(image.pop("base64"))))
        assert picture.size == (128, 128)
        assert picture.getpixel((5, 5)) == (image["seed"],) * 3
    assert len(values.pop("id")) == 32
    assert values.pop("created") > 1_700_000_000
    assert values["timings"].pop("total") >= 0
    assert values == golden


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
async def test_accept_gives_the_bytes(client: httpx2.AsyncClient, kind: str):
    headers = {"Accept": f"image/{kind}"}
    answer = await client.post("/v1/generate", json={"prompt": "x", "seed": 5}, headers=headers)
    assert answer.headers["content-type"] == f"image/{kind}"
    assert answer.headers["x-seed"] == "5"
    assert answer.headers["x-model"] == "sd15"
    assert Image.open(io.BytesIO(answer.content)).format == kind.upper()


async def test_accept_and_body_must_agree(client: httpx2.AsyncClient):
    png = {"Accept": "image/png"}
    for fields, headers, status, field in (
        ({"samples": 2}, png, 422, "samples"),
        ({"output_format": "webp"}, png, 422, "output_format"),
        ({}, {"Accept": "text/html"}, 406, "Accept"),
        ({}, {"Accept": "text/event-stream"}, 406, "Accept"),
        ({"stream": True}, png, 406, "Accept"),
    ):
        answer = await client.post("/v1/generate", json={"prompt": "x"} | fields, headers=headers)
        assert (answer.status_code, answer.json()["error"]["field"]) == (status, field)


async def test_any_picture_is_the_format_asked_for(client: httpx2.AsyncClient):
    request = {"prompt": "x", "output_format": "webp"}
    answer = await client.post("/v1/generate", json=request, headers={"Accept": "image/*"})
    assert answer.headers["content-type"] == "image/webp"


async def test_a_stream_tells_queued_progress_image_done(client: httpx2.AsyncClient):
    answer = await client.post("/v1/generate", json={"prompt": "x", "seed": 3, "samples": 2, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    names = [lines[0].removeprefix("event: ") for lines in events]
    queued, progress, *images, done = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert names == ["queued", "progress", "image", "image", "done"]
    assert queued["parameters"]["seed"] == 3
    assert progress == {
        "index": 0, "step": 25, "steps": 25, "forward": 1, "rows": 2,
        "preview": {"format": "jpeg", "base64": base64.b64encode(b"jpeg").decode()},
    }  # fmt: skip
    assert [image["seed"] for image in images] == [3, 4]
    assert done["images"] == [{"index": 0, "seed": 3}, {"index": 1, "seed": 4}]
    assert done["timings"]["denoise"] == 0.3


class Watched(bytes):
    """An encoded picture of some size that knows which threads have read it."""

    readers: ClassVar[set[threading.Thread]] = set()

    def __getitem__(self, key: Any) -> Any:
        self.readers.add(threading.current_thread())
        return super().__getitem__(key)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", {"prompt": "x"}),
        ("/v1/generate", {"prompt": "x", "stream": True}),
        ("/v1/upscale", {"image": base64.b64encode(PNG).decode()}),
    ],
)
async def test_large_pictures_are_put_into_json_beside_the_loop(
    client: httpx2.AsyncClient, router: MemoryRouter, path: str, body: dict[str, Any]
):
    for padding, beside in ((0, False), (3_000_000, True)):
        Watched.readers.clear()
        router.packed = lambda data, padding=padding: Watched(data + b"\1" * padding)
        answers = await asyncio.gather(*(client.post(path, json=body) for _ in range(3)))
        assert (threading.current_thread() not in Watched.readers) is beside
        assert Watched.readers
        for answer in answers:
            [text] = re.findall(r'"base64":"([^"]{200,})"', answer.text)
            assert len(text) > 4 * padding / 3
            assert base64.b64decode(text).endswith(b"\1" * padding)


async def test_the_models_say_what_they_can_do(client: httpx2.AsyncClient):
    listed = (await client.get("/v1/models")).json()["data"]
    assert [(model["id"], model["state"], model["default"]) for model in listed] == [
        ("sd15", "ready", True),
        ("sdxl", "ready", False),
    ]
    one = (await client.get("/v1/models/sdxl")).json()
    assert one == listed[1]
    assert one["samplers"]["euler_a"] == ["default", "sgm_uniform"]
    assert one["limits"]["max_pixels"] == 1024 * 1024
    assert (await client.get("/v1/models/nope")).status_code == 404


def test_a_model_whose_network_takes_the_guidance_scale_says_so():
    card = replace(CARDS["sd15"], guidance_input=True)
    told = from_model(ModelDescription(card=card, state="ready", default=True))
    assert told["guidance_input"]
    assert "guidance_input" not in from_model(ModelDescription(card=CARDS["sd15"], state="ready", default=True))
    request = GenerationRequest(model="sd15", prompt="a red circle").resolve(card)
    assert "guidance_input" not in parameters(request), "a request does not say what its model is"
    assert not json.loads(metadata.write(request, "abc", "full")["heliograph"])["parameters"].get("guidance_input")


async def test_a_list_of_models_is_whole_while_the_offer_changes(
    client: httpx2.AsyncClient, service: Service, router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
):
    async def changes(name: str) -> str:
        service.offer({"sdxl": CARDS["sdxl"]}, "sdxl")
        return "ready"

    monkeypatch.setattr(router, "state", changes)
    listed = (await client.get("/v1/models")).json()["data"]
    assert [(model["id"], model["default"]) for model in listed] == [("sd15", True), ("sdxl", False)]
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["sdxl"]
