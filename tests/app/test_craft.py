"""Masks, borders, variations, controls and adapters through the gateway: what becomes of each field, and refusals."""

import asyncio
import base64
import io
import json
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from app.dialects import native
from models.images import Picture
from models.parts import AdapterUse, ControlUse, Hires, Outpaint, Upscale
from models.request import EffectiveRequest, GenerationRequest
from tests.app.conftest import MemoryRouter, claimed


def png(value: int, mode: str = "RGB", size: tuple[int, int] = (96, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(buffer, "PNG")
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


PNG, WHITE = png(128), png(255, "L")
IMAGE, MASK = text(PNG), text(WHITE)


async def wanted(client: httpx2.AsyncClient, router: MemoryRouter, path: str, **body: Any) -> EffectiveRequest:
    """What the replica is asked for."""
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return router.requests[-1]


async def refusal(client: httpx2.AsyncClient, path: str, **body: Any) -> tuple[str, str]:
    """The field to blame, and what is said of it."""
    answer = await client.post(path, json=body)
    assert answer.status_code == 422, answer.text
    return answer.json()["error"]["field"], answer.json()["error"]["message"]


def test_every_field_arrives():
    as_they_are = {
        "prompt_syntax": "plain", "variation_seed": 3, "variation_strength": 0.1, "mask_blur": 1, "mask_grow": 2,
        "mask_fill": "noise", "mask_region": "masked", "mask_padding": 8, "paste_back": False, "stop_at_step": 5,
        "metadata": "full",
    }  # fmt: skip
    parts = {
        "outpaint": {"left": 8, "top": 16},
        "hires": {"scale": 1.5, "steps": 4, "denoise_strength": 0.5, "upscaler": "lanczos"},
        "controls": [
            {"name": "canny", "image": IMAGE, "weight": 0.5, "start": 0.1, "end": 0.9, "preprocessor": "canny"}
        ],
        "adapters": [{"name": "moon", "weight": 0.5}, {"name": "sun"}],
        "upscale": {"scale": 4.0, "model": "x4"},
    }
    body = native.GenerateBody.model_validate({"prompt": "x", "image": IMAGE, "mask": MASK} | as_they_are | parts)
    picture = Picture.from_bytes(PNG)
    assert native.to_request(body, "sd15") == GenerationRequest(
        model="sd15",
        prompt="x",
        image=picture,
        mask=Picture.from_bytes(WHITE),
        outpaint=Outpaint(left=8, top=16),
        hires=Hires(scale=1.5, steps=4, denoise_strength=0.5, upscaler="lanczos"),
        controls=(ControlUse(name="canny", image=picture, weight=0.5, start=0.1, end=0.9, preprocessor="canny"),),
        adapters=(AdapterUse(name="moon", weight=0.5), AdapterUse(name="sun")),
        upscale=Upscale(scale=4.0, model="x4"),
        **as_they_are,
    )


def test_parts_left_out_are_the_engines():
    body = native.GenerateBody.model_validate({"prompt": "x", "hires": {}, "upscale": {}})
    request = native.to_request(body, "sd15")
    assert (request.hires, request.upscale) == (Hires(), Upscale())


async def test_the_answer_shows_what_played_a_part(client: httpx2.AsyncClient):
    body = {
        "prompt": "x", "image": IMAGE, "mask": MASK, "mask_blur": 0, "seed": 1, "variation_strength": 0.5,
        "controls": [{"name": "canny", "image": IMAGE}], "adapters": [{"name": "moon", "weight": -1}],
    }  # fmt: skip
    told = (await client.post("/v1/generate", json=body)).json()["parameters"]
    size = {"width": 96, "height": 64}
    assert told["task"] == "inpaint"
    assert (told["image"], told["mask"]) == (size, size)
    assert (told["mask_blur"], told["mask_fill"], told["paste_back"]) == (0, "original", True)
    assert told["controls"] == [{"name": "canny", "image": size, "weight": 1.0, "start": 0.0, "end": 1.0}]
    assert told["adapters"] == [{"name": "moon", "weight": -1}]
    assert isinstance(told["variation_seed"], int)
    assert not {"hires", "outpaint", "upscale", "stop_at_step"} & set(told)
    plain = (await client.post("/v1/generate", json={"prompt": "x", "hires": {"scale": 2}})).json()["parameters"]
    assert plain["hires"] == {"scale": 2, "steps": 25, "denoise_strength": 0.7, "upscaler": "latent"}
    assert not {"mask_blur", "paste_back", "denoise_strength"} & set(plain)


# body, field, a word of the message
REFUSED = [
    ({"mask": MASK}, "mask", "image"),
    ({"image": IMAGE, "mask": "####"}, "mask", "base64"),
    ({"image": IMAGE, "mask": MASK, "mask_blur": 65}, "mask_blur", "between 0 and 64"),
    ({"image": IMAGE, "mask": MASK, "mask_blur": 1.5}, "mask_blur", "integer"),
    ({"image": IMAGE, "mask": MASK, "mask_fill": "white"}, "mask_fill", "noise"),
    ({"image": IMAGE, "mask_region": "masked"}, "mask_region", "mask"),
    ({"image": IMAGE, "outpaint": {}}, "outpaint", "one side"),
    ({"image": IMAGE, "outpaint": {"left": -8}}, "outpaint.left", "between 0 and 2048"),
    ({"image": IMAGE, "outpaint": {"middle": 8}}, "outpaint.middle", "left, right, top, bottom"),
    ({"outpaint": {"left": 8}}, "outpaint", "image"),
    ({"image": IMAGE, "outpaint": [8]}, "outpaint", ""),
    ({"hires": {"scale": 5}}, "hires.scale", "between 1.0 and 4.0"),
    ({"hires": {"scale": "2"}}, "hires.scale", "number"),
    ({"hires": {"upscaler": "magic"}}, "hires.upscaler", "latent"),
    ({"hires": 2}, "hires", ""),
    ({"controls": [{"name": "canny", "image": IMAGE, "weight": 3}]}, "controls.0.weight", "between 0.0 and 2.0"),
    ({"controls": [{"name": "canny", "image": IMAGE}, {"name": "x", "image": "AAAA"}]}, "controls.1.image", "PNG"),
    ({"controls": [{"name": "canny", "image": IMAGE, "strength": 1}]}, "controls.0.strength", "weight"),
    ({"controls": [{"name": "canny", "image": IMAGE, "start": 0.5, "end": 0.5}]}, "controls.0.start", "below end"),
    ({"controls": [{"image": IMAGE}]}, "controls.0.name", "required"),
    ({"controls": [{"name": "canny", "image": IMAGE}] * 5}, "controls", "between 0 and 4"),
    ({"controls": {"name": "canny"}}, "controls", "list"),
    ({"adapters": [{"name": "moon", "weight": 9}]}, "adapters.0.weight", "between -4.0 and 4.0"),
    ({"adapters": [{"name": "moon"}, {"name": "moon"}]}, "adapters", "twice"),
    ({"adapters": ["moon"]}, "adapters.0", ""),
    ({"upscale": {"scale": 9}}, "upscale.scale", "between 1.0 and 8.0"),
    ({"variation_strength": 1.5}, "variation_strength", "between 0.0 and 1.0"),
    ({"stop_at_step": 0}, "stop_at_step", "between 1 and 1000"),
    ({"prompt_syntax": "a1111"}, "prompt_syntax", "weighted"),
    ({"metadata": "all"}, "metadata", "minimal"),
    ({"image": IMAGE, "init_image": IMAGE}, "init_image", "one of the two"),
    ({"image": IMAGE, "image_strength": 0.5, "denoise_strength": 0.5}, "image_strength", "one of the two"),
    ({"image": IMAGE, "image_strength": 1.5}, "image_strength", "between 0.0 and 1.0"),
    ({"image_strength": 0.5}, "image_strength", "image"),
]


@pytest.mark.parametrize(("body", "field", "word"), REFUSED, ids=[f"{n}-{case[1]}" for n, case in enumerate(REFUSED)])
async def test_a_bad_field_is_named(client: httpx2.AsyncClient, body: dict[str, Any], field: str, word: str):
    named, message = await refusal(client, "/v1/generate", **{"prompt": "x"} | body)
    assert named == field
    assert word in message


async def test_image_strength_is_the_other_way_round(client: httpx2.AsyncClient, router: MemoryRouter):
    for given, meant in ((0.0, 1.0), (0.35, 0.65), (0.7, 0.3), (1, 0.0)):
        request = await wanted(client, router, "/v1/img2img", prompt="x", init_image=IMAGE, image_strength=given)
        assert request.denoise_strength == meant


async def test_img2img_needs_its_picture_and_prompt(client: httpx2.AsyncClient, router: MemoryRouter):
    assert (await wanted(client, router, "/v1/img2img", prompt="x", image=IMAGE)).task == "img2img"
    assert (await refusal(client, "/v1/img2img", prompt="x"))[0] == "image"
    assert (await refusal(client, "/v1/img2img", image=IMAGE))[0] == "prompt"


async def test_inpaint_needs_a_mask_or_transparency(client: httpx2.AsyncClient, router: MemoryRouter):
    assert (await wanted(client, router, "/v1/inpaint", prompt="x", image=IMAGE, mask=MASK)).task == "inpaint"
    assert await refusal(client, "/v1/inpaint", prompt="x", image=IMAGE) == (
        "mask", "is required, white where to draw anew, unless `image` is transparent there"
    )  # fmt: skip
    assert (await refusal(client, "/v1/inpaint", prompt="x", mask=MASK))[0] == "image"
    hole = np.full((64, 96, 4), 255, np.uint8)
    hole[16:32, 24:48, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(hole).save(buffer, "PNG")
    request = await wanted(client, router, "/v1/inpaint", prompt="x", init_image=text(buffer.getvalue()))
    assert request.mask is not None
    expected = np.zeros((64, 96, 3), np.uint8)
    expected[16:32, 24:48] = 255
    np.testing.assert_array_equal(request.mask.array(), expected)
    given = await wanted(client, router, "/v1/inpaint", prompt="x", image=text(buffer.getvalue()), mask=MASK)
    assert given.mask is not None
    assert given.mask.array().min() == 255


async def test_outpaint_grows(client: httpx2.AsyncClient, router: MemoryRouter):
    request = await wanted(client, router, "/v1/outpaint", image=IMAGE, left=32, bottom=64)
    assert (request.outpaint, request.task) == (Outpaint(left=32, bottom=64), "inpaint")
    assert (request.width, request.height, request.prompt) == (128, 128, "")
    assert (await refusal(client, "/v1/outpaint", prompt="x", left=8))[0] == "image"
    assert (await refusal(client, "/v1/outpaint", image=IMAGE))[0] == "left"
    assert await refusal(client, "/v1/outpaint", image=IMAGE, top=4000) == (
        "top", "must be between 0 and 2048, not 4000"
    )  # fmt: skip
    assert (await refusal(client, "/v1/outpaint", image=IMAGE, left=8, outpaint={"left": 8}))[0] == "outpaint"


async def test_variations_of_a_picture(client: httpx2.AsyncClient, router: MemoryRouter):
    request = await wanted(client, router, "/v1/variations", image=IMAGE)
    assert (request.task, request.prompt, request.samples, request.denoise_strength) == ("img2img", "", 4, 0.5)
    stronger = await wanted(client, router, "/v1/variations", image=IMAGE, image_strength=0.2, samples=2)
    assert (stronger.samples, stronger.denoise_strength) == (2, 0.8)


async def test_variations_of_a_seed(client: httpx2.AsyncClient, router: MemoryRouter):
    request = await wanted(client, router, "/v1/variations", prompt="x", seed=7)
    assert (request.seed, request.samples, request.variation_strength) == (7, 4, 0.2)
    assert [request.sample(i).seed for i in range(4)] == [7] * 4
    assert len({request.sample(i).variation_seed for i in range(4)}) == 4
    assert (await wanted(client, router, "/v1/variations", prompt="x", seed=7, variation_strength=0.0)).samples == 4
    assert (await refusal(client, "/v1/variations", prompt="x"))[0] == "seed"
    assert (await refusal(client, "/v1/variations", seed=7))[0] == "prompt"
    answer = await client.post("/v1/variations", json={"image": IMAGE}, headers={"Accept": "image/png"})
    assert answer.json()["error"]["field"] == "samples"


async def test_every_endpoint_answers_in_every_form(client: httpx2.AsyncClient):
    for path, body in (
        ("/v1/img2img", {"prompt": "x", "image": IMAGE}),
        ("/v1/inpaint", {"prompt": "x", "image": IMAGE, "mask": MASK}),
        ("/v1/outpaint", {"image": IMAGE, "left": 32}),
        ("/v1/variations", {"image": IMAGE, "samples": 1}),
    ):
        assert (await client.post(path, json=body)).json()["images"][0]["height"] == 64
        picture = await client.post(path, json=body, headers={"Accept": "image/webp"})
        assert Image.open(io.BytesIO(picture.content)).format == "WEBP"
        stream = await client.post(path, json=body | {"stream": True})
        assert "event: done" in stream.text


async def test_pictures_that_are_too_large_together_are_refused_undecoded(client: httpx2.AsyncClient):
    """Each may have 64 Mi pixels; all of a request 128 Mi. These have headers and no pixels: they cannot be decoded."""
    large, half = text(claimed(8192, 8192)), text(claimed(8192, 4096))
    control = {"name": "canny", "image": large}
    for fields, field in (
        ({"image": large, "mask": large, "controls": [{"name": "canny", "image": IMAGE}]}, "controls.0.image"),
        ({"image": IMAGE, "controls": [control, control]}, "controls.1.image"),
        ({"image": half, "mask": half, "controls": [control, {"name": "canny", "image": IMAGE}]}, "controls.1.image"),
    ):
        named, message = await refusal(client, "/v1/generate", prompt="x", **fields)
        assert (named, "at most 134217728 pixels" in message) == (field, True)
    for fields in ({"image": large, "mask": large}, {"controls": [control, control]}):
        assert "not a readable" in (await refusal(client, "/v1/generate", prompt="x", **fields))[1]
    files = {name: ("file", claimed(8192, 8192)) for name in ("image", "mask", "control_image_0")}
    answer = await client.post("/v1/inpaint", data={"prompt": "x", "controls": '[{"name": "canny"}]'}, files=files)
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "controls.0.image")


async def test_the_lists(client: httpx2.AsyncClient):
    samplers = {entry["name"]: entry for entry in (await client.get("/v1/samplers")).json()["data"]}
    assert "k_euler_a" in samplers["euler_a"]["aliases"]
    assert samplers["ddim"]["schedules"] == ["default", "sgm_uniform"]
    assert (await client.get("/v1/adapters")).json() == {
        "object": "list",
        "data": [
            {"name": "moon", "kind": "lora", "models": ["sd15"], "base": "sd15", "sha256": "ab" * 32, "bytes": 1234},
            {"name": "lanczos", "kind": "upscaler", "models": ["sd15", "sdxl"], "base": None, "sha256": None,
             "bytes": None},
            {"name": "2x", "kind": "upscaler", "models": ["sd15", "sdxl"], "base": None, "sha256": None,
             "bytes": None},
        ],
    }  # fmt: skip
    limits = (await client.get("/v1/models/sd15")).json()["limits"]
    assert limits["mask_blur"] == [0, 64]
    assert limits["hires_scale"] == [1.0, 4.0]
    assert limits["adapter_weight"] == [-4.0, 4.0]
    assert limits["size_multiple"] == 8


@pytest.mark.parametrize(("ending", "last"), [("accept", "done"), ("cancel", "error")])
async def test_a_running_request_can_be_ended(client: httpx2.AsyncClient, router: MemoryRouter, ending: str, last: str):
    router.gate.clear()
    asking = asyncio.create_task(client.post("/v1/generate", json={"prompt": "x", "stream": True}))
    for _ in range(2000):
        if router.running:  # the replica has it
            break
        await asyncio.sleep(0.01)
    [id] = router.running
    answer = await client.post(f"/v1/requests/{id}/{ending}")
    assert (answer.status_code, answer.json()) == (202, {"id": id})
    name, data = (await asking).text.strip().split("\n\n")[-1].split("\n")
    assert name == f"event: {last}"
    values = json.loads(data.removeprefix("data: "))
    assert values["id"] == id if ending == "accept" else values["error"]["code"] == "cancelled"
    assert (await client.post(f"/v1/requests/{id}/{ending}")).status_code == 404


@pytest.mark.parametrize("id", ["0" * 32, "nope", "%2e%2e", "a" * 5000])
async def test_an_unknown_request_cannot_be_ended(client: httpx2.AsyncClient, id: str):
    for ending in ("accept", "cancel"):
        answer = await client.post(f"/v1/requests/{id}/{ending}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_the_documentation_shows_json_and_forms(client: httpx2.AsyncClient):
    schema = (await client.get("/openapi.json")).json()
    assert "$ref" not in json.dumps(schema["paths"]["/v1/inpaint"]["post"]["requestBody"])
    content = schema["paths"]["/v1/inpaint"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    assert content["multipart/form-data"]["schema"]["properties"]["mask"]["format"] == "binary"
    controls = content["application/json"]["schema"]["properties"]["controls"]["anyOf"][0]["items"]
    assert controls["properties"]["weight"]["maximum"] == 2.0
    assert set(schema["paths"]["/v1/generate"]["post"]["requestBody"]["content"]) == {"application/json"}
