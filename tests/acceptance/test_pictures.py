"""Pictures over real HTTP: what comes back, in each form, and what is refused."""

import base64
import io

import httpx2
import numpy as np
import pytest
from PIL import Image

from tests.acceptance.conftest import Server
from tests.app.test_ingress import REFUSED


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)


def picture(answer: httpx2.Response, index: int = 0) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return decode(base64.b64decode(answer.json()["images"][index]["base64"]))


def test_a_prompt_is_followed(server: Server):
    answer = server.post(prompt="a large red circle in the center on a blue background", samples=4, seed=1)
    right = 0
    for index in range(4):
        pixels = picture(answer, index)
        corner, middle = pixels[:12, :12].mean((0, 1)), pixels[56:72, 56:72].mean((0, 1))
        right += corner.argmax() == 2 and middle.argmax() == 0 and middle[0] > 1.3 * middle[2]
    assert right >= 3


def test_a_seed_gives_the_same_bytes_again(server: Server):
    first, again = (server.post(seed=11, steps=6).json() for _ in range(2))
    assert first["images"] == again["images"]
    assert first["parameters"] == again["parameters"]
    assert first["id"] != again["id"]
    several = server.post(seed=10, steps=6, samples=2).json()["images"]
    assert [image["seed"] for image in several] == [10, 11]
    alone, shared = (decode(base64.b64decode(i["base64"])) for i in (first["images"][0], several[1]))
    assert abs(alone - shared).max() <= 1


def test_an_answer_tells_what_was_done(server: Server):
    values = server.post(steps=4, sampler="k_euler_a", width=192, height=64).json()
    assert picture(server.post(steps=4, width=192, height=64)).shape == (64, 192, 3)
    assert values["model"] == "sd15"
    assert values["revision"]
    assert values["parameters"]["sampler"] == "euler_a"
    assert values["parameters"]["seed"] == values["images"][0]["seed"]
    timings = values["timings"]
    assert set(timings) == {"queued", "encode", "denoise", "decode", "total"}
    assert timings["denoise"] <= timings["total"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_accept_gives_bytes(server: Server, kind: str):
    body = {"prompt": "a red circle", "steps": 4, "seed": 3}
    answer = httpx2.post(f"{server.address}/v1/generate", json=body, headers={"Accept": f"image/{kind}"}, timeout=60)
    assert answer.headers["content-type"] == f"image/{kind}"
    assert answer.headers["x-seed"] == "3"
    assert decode(answer.content).shape == (128, 128, 3)


def test_a_picture_starts_from_a_picture(server: Server):
    start = server.post(prompt="a green square on a yellow background", seed=2, steps=8)
    image = start.json()["images"][0]["base64"]
    near = server.post(prompt="a green square on a yellow background", image=image, denoise_strength=0.0, seed=5)
    assert near.json()["parameters"]["task"] == "img2img"
    assert abs(picture(start) - picture(near)).mean() < 25


def test_a_stream_is_in_order(server: Server):
    with server.stream(steps=5, seed=1, preview_every=2) as events:
        seen = list(events)
    assert [event.name for event in seen] == ["queued", *["progress"] * 5, "image", "done"]
    steps = [event.data["step"] for event in seen if event.name == "progress"]
    assert steps == [1, 2, 3, 4, 5]
    previews = [base64.b64decode(e.data["preview"]["base64"]) for e in seen if "preview" in e.data]
    assert len(previews) == 2
    assert all(Image.open(io.BytesIO(preview)).format == "JPEG" for preview in previews)
    assert seen[-1].data["images"] == [{"index": 0, "seed": 1}]


def test_the_models_are_listed(server: Server):
    models = {model["id"]: model for model in httpx2.get(f"{server.address}/v1/models").json()["data"]}
    assert set(models) == {"sd15", "sd21", "sdxl"}
    assert models["sd15"]["state"] == "ready"
    assert models["sd15"]["default"]
    assert models["sd21"]["state"] in ("cold", "loading", "ready")
    assert models["sdxl"]["state"] in ("loading", "ready"), "it is awake from the start"
    assert models["sdxl"]["limits"]["max_pixels"] == 1024 * 1024


def test_a_model_that_sleeps_wakes_for_a_request(server: Server):
    answer = server.post(model="sd21", prompt="a red circle on a blue background", seed=1, steps=12)
    red, _, blue = picture(answer)[64, 64]
    assert red > 1.3 * blue
    assert httpx2.get(f"{server.address}/v1/models/sd21").json()["state"] == "ready"


BY_CONFIGURATION = ("sd15, sdxl", "fetches no pictures")  # the small service of tests/app has other models, no client


def test_every_bad_body_is_refused(server: Server):
    for body, status, field, word in REFUSED:
        if status == 413:  # the limit of the configuration that ships is higher
            continue
        answer = httpx2.post(f"{server.address}/v1/generate", content=body.encode(), timeout=30)
        assert answer.status_code == status, (body[:80], answer.text[:300])
        error = answer.json()["error"]
        assert error.get("field") == field
        if word not in BY_CONFIGURATION:
            assert word in error["message"]


def test_a_body_beyond_the_limit_is_refused(server: Server):
    answer = httpx2.post(f"{server.address}/v1/generate", content=b" " * (33 * 1024 * 1024), timeout=60)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_a_request_id_comes_back_once(server: Server):
    answer = httpx2.get(f"{server.address}/healthz", headers={"x-request-id": "abc-1"})
    assert answer.headers.get_list("x-request-id") == ["abc-1"]
