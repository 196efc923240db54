"""`POST /v1/metadata` and multipart bodies through the whole gateway, on a service in memory."""

import base64
import json

import httpx2
import numpy as np
import pytest

from app import multipart
from app.errors import BodyTooLarge, MalformedBody
from models.errors import InvalidRequest
from models.images import MEDIA_TYPES, encode
from models.metadata import write
from models.parts import ArmUse
from models.request import EffectiveRequest, GenerationRequest
from tests.app.conftest import CARDS

GREY = np.full((64, 72, 3), 90, np.uint8)


def request_for(**given: object) -> EffectiveRequest:
    wanted = {"model": "sdxl", "prompt": "a Käse, 猫", "seed": 5, "steps": 7, "sampler": "unipc"} | given
    return GenerationRequest(**wanted).resolve(CARDS["sdxl"])


def picture(format: str = "png", metadata: str = "full", **given: object) -> bytes:
    request = request_for(output_format=format, **given)
    return encode(GREY, format, write(request, "0123456789ab", metadata))


@pytest.mark.parametrize("format", MEDIA_TYPES)
async def test_the_answer_can_be_posted_as_it_is(client: httpx2.AsyncClient, router, format: str):
    answer = await client.post("/v1/metadata", content=picture(format), headers={"content-type": f"image/{format}"})
    assert answer.status_code == 200, answer.text
    values = answer.json()
    assert (values["source"], values["format"], values["width"], values["height"]) == ("heliograph", format, 72, 64)
    assert values["warnings"] == []
    assert "Steps: 7, Sampler: UniPC" in values["infotext"]
    assert (await client.post("/v1/generate", json=values["parameters"])).status_code == 200
    assert router.requests[-1] == request_for(output_format=format)


async def test_every_way_to_send_a_picture_is_the_same(client: httpx2.AsyncClient):
    data = picture()
    bare = base64.b64encode(data).decode()
    ways = {
        "bytes": {"content": data},
        "as curl sends it": {"content": data, "headers": {"content-type": "application/x-www-form-urlencoded"}},
        "a lie": {"content": data, "headers": {"content-type": "application/json"}},
        "base64": {"json": {"image": bare}},
        "a data URI": {"json": {"image": f"data:image/jpeg;base64,{bare}"}},
        "JSON that is called a picture": {"content": b'\n {"image": "%s"}' % bare.encode()},
        "a file": {"files": {"image": ("x.gif", data, "image/gif")}},
        "a field": {"files": {"image": (None, bare)}},
    }
    answers = {way: await client.post("/v1/metadata", **sent) for way, sent in ways.items()}
    assert {way: answer.status_code for way, answer in answers.items()} == dict.fromkeys(ways, 200)
    assert len({answer.text for answer in answers.values()}) == 1


async def test_a_picture_without_metadata_has_no_source(client: httpx2.AsyncClient):
    values = (await client.post("/v1/metadata", content=picture(metadata="none"))).json()
    assert values == {
        "source": None, "parameters": {}, "infotext": None, "format": "png", "width": 72, "height": 64, "warnings": [],
    }  # fmt: skip


async def test_what_cannot_be_posted_here_is_left_out_and_told(client: httpx2.AsyncClient):
    text = "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Model: dreams, ENSD: 3, Mask blur: 4"
    values = (await client.post("/v1/metadata", content=encode(GREY, "png", {"parameters": text}))).json()
    assert values["source"] == "a1111"
    assert (await client.post("/v1/generate", json=values["parameters"])).status_code == 200
    left = " ".join(values["warnings"])
    assert "there is no model 'dreams'" in left
    assert "ENSD: 3" in left


async def test_what_somebody_edited_does_no_harm(client: httpx2.AsyncClient):
    for parameters in (
        '{"model": ["x"], "prompt": 3, "steps": "many", "seed": {}}',
        '{"prompt": "x", "seed": 99999999999999999999999, "steps": 4}',
        '{"prompt": {"sha256": []}, "sampler": {"a": {"sha256": 1}}}',
    ):
        data = encode(GREY, "png", {"heliograph": f'{{"parameters": {parameters}}}'})
        answer = await client.post("/v1/metadata", content=data)
        assert answer.status_code == 200, answer.text
        assert set(answer.json()["parameters"]) <= {"prompt", "steps", "deep_cache"}


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> dict[str, object]:
    body = b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + end
    return {"content": body, "headers": {"content-type": "multipart/form-data; boundary=b"}}


REFUSED = {
    "nothing": ({"content": b""}, 422, "image"),
    "text": ({"content": b"hello"}, 422, "image"),
    "no image": ({"json": {"picture": "x"}}, 422, "image"),
    "one field more": ({"json": {"image": "AAAA", "more": 1}}, 422, "more"),
    "no base64": ({"json": {"image": "####"}}, 422, "image"),
    "a list": ({"content": b"[]"}, 400, "body"),
    "bad JSON": ({"content": b"{"}, 400, "body"),
    "two pictures": ({"files": [("image", ("a", b"1")), ("image", ("b", b"2"))]}, 422, "image"),
    "another part": ({"files": {"mask": ("a", b"1")}}, 422, "image"),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "body"),
    "another kind": ({"content": b"x", "headers": {"content-type": "multipart/mixed; boundary=b"}}, 400, "body"),
    "long boundary": (
        {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=" + "b" * 999}}, 400, "body"
    ),
    "cut off": (form(b'name="image"; filename="x"\r\n\r\nabc', end=b""), 400, "body"),
    "no name": (form(b'filename="x"\r\n\r\nabc'), 400, "body"),
    "no header": (form(b"\r\nabc"), 400, "body"),
    "endless header": (form(b"name=" + b"x" * 90_000), 400, "body"),
    "binary field": (form(b'name="image"\r\n\r\n\xff\xfe'), 422, "image"),
    "field twice": (form(b'name="image"\r\n\r\na', b'name="image"\r\n\r\nb'), 422, "image"),
    "many parts": (form(*[b'name="a%d"\r\n\r\n' % i for i in range(1_000)]), 413, "body"),
    "a large body": ({"content": bytes(200_000)}, 413, "body"),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "status", "field"), REFUSED.values(), ids=REFUSED)
async def test_a_bad_body_is_refused_by_name(client: httpx2.AsyncClient, sent: dict, status: int, field: str):
    answer = await client.post("/v1/metadata", **sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (status, field), answer.text
    assert len(answer.text) < 1000


BOUNDARY = "multipart/form-data; boundary=b"


def parsed(*parts: bytes, max_parts: int = 8, max_field_bytes: int = 100) -> multipart.Form:
    return multipart.parse(form(*parts)["content"], BOUNDARY, max_parts, max_field_bytes)


def test_fields_and_files_are_kept_apart():
    fields, files = parsed(
        b'name="prompt"\r\n\r\nK\xc3\xa4se\r\nund Brot',
        b'name="image[]"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n\x89PNG\r\n--c\r\n',
        b'name="image[]"; filename=""\r\n\r\n',
        b'name="empty"\r\n\r\n',
    )
    assert fields == {"prompt": "Käse\r\nund Brot", "empty": ""}
    assert files == {"image[]": [b"\x89PNG\r\n--c\r\n", b""]}


def test_each_kind_of_part_has_its_limit():
    assert parsed(b'name="image"; filename="x"\r\n\r\n' + bytes(1_000_000))[1]["image"] == [bytes(1_000_000)]
    for parts, error, field in (
        ([b'name="prompt"\r\n\r\n' + b"x" * 101], BodyTooLarge, "prompt"),
        ([b'name="x"; filename="x"\r\n\r\n'] * 9, BodyTooLarge, "body"),
        ([b'name="x"\r\n' + b"a: b\r\n" * 1_000 + b"\r\n"], MalformedBody, "body"),
        ([b'name="x"\r\n\r\n1'] * 2, InvalidRequest, "x"),
    ):
        with pytest.raises(error) as refused:
            parsed(*parts)
        assert refused.value.field == field


async def test_the_arm_of_an_experiment_is_told_beside_the_parameters(client: httpx2.AsyncClient):
    arm = ArmUse(experiment="steps", arm="fast", assigned="fast", version="v1", unit="nobodys")
    text = write(request_for(experiments=(arm,)), "0123456789ab", "full")
    assert json.loads(text["heliograph"])["experiments"] == [{"name": "steps", "arm": "fast"}]
    assert "nobodys" not in str(text)  # whose picture it is, is nobody's business
    assert "experiments" not in json.loads(
        write(request_for(experiments=(arm,)), "0123456789ab", "minimal")["heliograph"]
    )
    answer = await client.post("/v1/metadata", content=picture(experiments=(arm,)))
    assert answer.json()["warnings"] == []
    assert (await client.post("/v1/generate", json=answer.json()["parameters"])).status_code == 200
