"""Forms with files say what JSON says, and bad ones are refused by the field's name."""

import base64
import io
import json
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from app.dialects.native.bodies import GenerateBody
from app.dialects.native.forms import from_form
from models.errors import InvalidRequest
from models.images import encode
from tests.app.conftest import MemoryRouter

GREY = np.full((64, 96, 3), 128, np.uint8)
PNG = encode(GREY, "png")
MASK = encode(np.where(np.arange(96)[None, :, None] < 48, np.uint8(255), np.uint8(0)) + 0 * GREY, "png")
BASE64 = base64.b64encode(PNG).decode()

# every kind of field, as a form writes it and as JSON has it
FIELDS: dict[str, tuple[str, Any]] = {
    "prompt": ("a red circle", "a red circle"),
    "negative_prompt": ("7", "7"),
    "steps": ("30", 30),
    "seed": ("0", 0),
    "guidance_scale": ("7", 7),
    "denoise_strength": ("0.45", 0.45),
    "paste_back": ("false", False),
    "mask_fill": ("noise", "noise"),
    "output_format": ("jpg", "jpg"),
    "outpaint": ('{"left": 8}', {"left": 8}),
    "hires": ('{"scale": 1.5, "upscaler": "lanczos"}', {"scale": 1.5, "upscaler": "lanczos"}),
    "adapters": ('[{"name": "moon", "weight": 0.5}]', [{"name": "moon", "weight": 0.5}]),
    "image": (BASE64, BASE64),
}


def test_a_form_says_what_json_says():
    written = {name: text for name, (text, _) in FIELDS.items()}
    meant = {name: value for name, (_, value) in FIELDS.items()}
    values = from_form(written, {}, GenerateBody)
    assert values == meant
    assert GenerateBody.model_validate(values) == GenerateBody.model_validate(meant)


def test_files_take_the_place_of_base64():
    fields = {"controls": '[{"name": "canny"}, {"name": "depth", "weight": 0.5}]'}
    files = {"image": [PNG], "control_image_1": [b"second"], "control_image_0": [b"first"]}
    assert from_form(fields, files, GenerateBody) == {
        "image": PNG,
        "controls": [{"name": "canny", "image": b"first"}, {"name": "depth", "weight": 0.5, "image": b"second"}],
    }


@pytest.mark.parametrize(
    ("fields", "files", "field"),
    [
        ({"image": BASE64}, {"image": [PNG]}, "image"),
        ({}, {"image": [PNG, PNG]}, "image"),
        ({}, {"control_image_0": [PNG]}, "control_image_0"),
        ({"controls": "[]"}, {"control_image_0": [PNG]}, "control_image_0"),
        ({"controls": '"x"'}, {"control_image_0": [PNG]}, "control_image_0"),
        ({"controls": "[1]"}, {"control_image_0": [PNG]}, "control_image_0"),
        ({"controls": '[{"name": "a", "image": "AAAA"}]'}, {"control_image_0": [PNG]}, "control_image_0"),
    ],
)
def test_a_picture_has_one_place(fields: dict[str, str], files: dict[str, list[bytes]], field: str):
    with pytest.raises(InvalidRequest) as refused:
        from_form(fields, files, GenerateBody)
    assert refused.value.field == field


# fields, files, status, field, a word of the message
REFUSED = [
    ({"steps": "abc"}, {}, 422, "steps", "JSON"),
    ({"steps": ""}, {}, 422, "steps", "JSON"),
    ({"steps": "2.5"}, {}, 422, "steps", "integer"),
    ({"steps": '"20"'}, {}, 422, "steps", "integer"),
    ({"steps": "true"}, {}, 422, "steps", "integer"),
    ({"steps": "0"}, {}, 422, "steps", "between 1 and 150"),
    ({"steps": "999999999999999999999"}, {}, 422, "steps", "integer"),
    ({"guidance_scale": "NaN"}, {}, 422, "guidance_scale", "JSON"),
    ({"guidance_scale": "1e999"}, {}, 422, "guidance_scale", ""),
    ({"paste_back": "yes"}, {}, 422, "paste_back", "JSON"),
    ({"paste_back": "1"}, {}, 422, "paste_back", "boolean"),
    ({"stream": "0"}, {}, 422, "stream", "boolean"),
    ({"hires": "[" * 90_000}, {}, 422, "hires", "JSON"),
    ({"hires": '{"scale": 2, "size": 3}'}, {}, 422, "hires.size", "scale, steps"),
    ({"controls": '[{"name": "canny", "image": 7}]'}, {}, 422, "controls.0.image", "base64"),
    ({"controls": '[{"name": "canny"}]'}, {}, 422, "controls.0.image", "required"),
    ({"adapters": "moon"}, {}, 422, "adapters", "JSON"),
    ({"promt": "x"}, {}, 422, "promt", "unknown field"),
    ({}, {"picture": PNG}, 422, "picture", "unknown field"),
    ({}, {"steps": b"20"}, 422, "steps", "integer"),
    ({}, {"negative_prompt": b"x"}, 422, "negative_prompt", "string"),
    ({}, {"mask": b"<svg/>"}, 422, "mask", "PNG"),
    ({}, {"mask": b""}, 422, "mask", "PNG"),
    ({}, {"mask": PNG[:60]}, 422, "mask", "PNG"),
    ({"init_image": BASE64}, {}, 422, "init_image", "image"),
    ({"prompt": "a\0b"}, {}, 422, "prompt", "NUL"),
    ({"model": "nope"}, {}, 404, None, "sd15, sdxl"),
]


@pytest.mark.parametrize(("fields", "files", "status", "field", "word"), REFUSED)
async def test_a_bad_form_is_refused_by_name(
    client: httpx2.AsyncClient, fields: dict[str, str], files: dict[str, bytes], status: int, field: str, word: str
):
    uploads = {"image": ("a.png", PNG)} | {name: ("file", data) for name, data in files.items()}
    answer = await client.post("/v1/img2img", data={"prompt": "x"} | fields, files=uploads)
    assert answer.status_code == status, answer.text[:300]
    assert answer.json()["error"].get("field") == field, answer.text[:300]
    assert word in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nred', "multipart/form-data; boundary=x"),
        (b"{}", "multipart/form-data"),
        (b"prompt=red", "application/x-www-form-urlencoded"),
    ],
)
async def test_what_is_no_form_is_refused(client: httpx2.AsyncClient, content: bytes, kind: str):
    answer = await client.post("/v1/img2img", content=content, headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_body")


async def test_a_form_with_endless_parts_is_refused(client: httpx2.AsyncClient):
    part = b'--x\r\nContent-Disposition: form-data; name="a%d"\r\n\r\n1\r\n'
    content = b"".join(part % n for n in range(1000)) + b"--x--\r\n"
    answer = await client.post(
        "/v1/img2img", content=content, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code == 413


async def test_a_form_beyond_the_limit_is_refused(client: httpx2.AsyncClient):
    answer = await client.post("/v1/img2img", data={"prompt": "x"}, files={"image": ("a", b"0" * 200_000)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_source_002_sends_this(client: httpx2.AsyncClient, router: MemoryRouter):
    """Its two curl commands, field by field; the Authorization header comes along."""
    headers = {"Authorization": "Bearer sk-1"}
    fields = {"prompt": "inked comic style, dynamic shadows", "image_strength": "0.45", "steps": "30"}
    answer = await client.post("/v1/img2img", data=fields, files={"init_image": ("sketch.png", PNG)}, headers=headers)
    assert answer.status_code == 200, answer.text
    told = answer.json()["parameters"]
    assert told["image"] == {"width": 96, "height": 64}
    assert (told["task"], told["denoise_strength"], told["steps"]) == ("img2img", 0.55, 30)
    assert Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]["base64"]))).size == (96, 64)
    fields = {"prompt": "replace background with cozy cafe interior, warm light", "steps": "35"}
    uploads = {"init_image": ("photo.png", PNG), "mask": ("mask.png", MASK)}
    answer = await client.post("/v1/inpaint", data=fields, files=uploads, headers=headers)
    assert answer.status_code == 200, answer.text
    told = answer.json()["parameters"]
    assert (told["task"], told["mask"]) == ("inpaint", {"width": 96, "height": 64})
    assert router.requests[-1].mask is not None
    assert router.requests[-1].mask.array()[0, :, 0].tolist() == [255] * 48 + [0] * 48


async def test_a_form_may_be_streamed(client: httpx2.AsyncClient):
    fields = {"prompt": "x", "stream": "true"}
    answer = await client.post("/v1/img2img", data=fields, files={"image": ("a.png", PNG)})
    names = [block.split("\n")[0] for block in answer.text.strip().split("\n\n")]
    assert names == ["event: queued", "event: progress", "event: image", "event: done"]


async def test_generate_takes_json_alone(client: httpx2.AsyncClient):
    answer = await client.post("/v1/generate", data={"prompt": "x"}, files={"image": ("a.png", PNG)})
    assert answer.status_code == 400
    plain = await client.post("/v1/img2img", content=json.dumps({"prompt": "x", "image": BASE64}).encode())
    assert plain.status_code == 200
