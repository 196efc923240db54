"""Masks, borders, variations and early ends over real HTTP, judged by the pictures that come back."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from bench.serving import PROJECT
from tests.acceptance.conftest import Server, look_at
from tests.acceptance.test_pictures import decode, picture

SCENE = "a large red circle in the center on a blue background"
HOLE = (slice(40, 88), slice(40, 88))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ask(server: Server, path: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{server.address}{path}", json=body, timeout=300)


@pytest.fixture(scope="module")
def scene(server: Server) -> np.ndarray:
    """A red circle on blue, as it was drawn: (128, 128, 3)."""
    return picture(server.post(prompt=SCENE, seed=1, steps=12))


@pytest.fixture(scope="module")
def hole() -> np.ndarray:
    """A mask, white in the middle: (128, 128)."""
    mask = np.zeros((128, 128))
    mask[HOLE] = 255
    return mask


def far(mask: np.ndarray, pixels: int = 16) -> np.ndarray:
    """Where the picture is further from the mask than its blur reaches."""
    reach = np.zeros_like(mask, dtype=bool)
    ys, xs = np.nonzero(mask)
    reach[max(0, ys.min() - pixels) : ys.max() + pixels + 1, max(0, xs.min() - pixels) : xs.max() + pixels + 1] = True
    return ~reach


# Source document 002, with host and key replaced
IMG2IMG = """curl -X POST \\
  {address}/v1/img2img \\
  -H "Authorization: Bearer $SD_API_KEY" \\
  -F "init_image=@./sketch.png" \\
  -F "prompt=inked comic style, dynamic shadows" \\
  -F "image_strength=0.45" \\
  -F "steps=30" \\
  -o response.json"""
INPAINT = """curl -X POST \\
  {address}/v1/inpaint \\
  -H "Authorization: Bearer $SD_API_KEY" \\
  -F "init_image=@./photo.png" \\
  -F "mask=@./mask.png" \\
  -F "prompt=replace background with cozy cafe interior, warm light" \\
  -F "steps=35" \\
  -o response.json"""


@pytest.mark.parametrize("command", [IMG2IMG, INPAINT], ids=["img2img", "inpaint"])
def test_the_documents_curl_runs(
    server: Server, scene: np.ndarray, hole: np.ndarray, tmp_path: Path, command: str
) -> None:
    for name, pixels in (("sketch", scene), ("photo", scene), ("mask", hole)):
        (tmp_path / f"{name}.png").write_bytes(png(pixels))
    script = "SD_API_KEY=any; " + command.format(address=server.address)
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, check=True, capture_output=True, timeout=200)
    answer = json.loads((tmp_path / "response.json").read_text())
    drawn = decode(base64.b64decode(answer["images"][0]["base64"]))
    assert drawn.shape == scene.shape
    if command is IMG2IMG:
        assert answer["parameters"]["denoise_strength"] == 0.55
        assert answer["parameters"]["steps"] == 30
    else:
        np.testing.assert_array_equal(drawn[far(hole)], scene[far(hole)])


def test_image_strength_is_how_closely_the_picture_is_followed(server: Server, scene: np.ndarray):
    away = []
    for strength in (0.9, 0.5, 0.0):
        fields = {"prompt": "a green square on a yellow background", "image_strength": str(strength), "seed": "3"}
        uploads = {"init_image": ("scene.png", png(scene))}
        answer = httpx2.post(f"{server.address}/v1/img2img", data=fields, files=uploads, timeout=120)
        away.append(abs(picture(answer) - scene).mean())
    assert away[0] < away[1] < away[2], away
    assert away[0] < 25 < away[2], away


@pytest.mark.parametrize("region", ["whole", "masked"])
def test_inpainting_changes_the_hole_and_nothing_else(server: Server, scene: np.ndarray, hole: np.ndarray, region: str):
    body = {"image": text(png(scene)), "mask": text(png(hole)), "mask_region": region, "mask_blur": 2}
    drawn = picture(ask(server, "/v1/inpaint", prompt="a green square on a blue background", seed=2, **body))
    np.testing.assert_array_equal(drawn[far(hole)], scene[far(hole)])
    red_before, red_after = (p[HOLE][..., 0].mean() for p in (scene, drawn))
    assert red_after < red_before - 40, (red_before, red_after)


def test_without_a_mask_what_is_transparent_is_drawn_anew(server: Server, scene: np.ndarray, hole: np.ndarray):
    body = {"prompt": "a green square on a blue background", "seed": 2, "mask_fill": "noise"}
    seen = np.dstack([scene, 255 - hole])
    drawn = picture(ask(server, "/v1/inpaint", image=text(png(seen)), **body))
    np.testing.assert_array_equal(drawn[far(hole)], scene[far(hole)])
    assert abs(drawn[HOLE] - scene[HOLE]).mean() > 20


def test_outpainting_grows_the_picture(server: Server, scene: np.ndarray):
    body = {"image": text(png(scene)), "left": 64, "bottom": 32, "mask_blur": 2}
    drawn = picture(ask(server, "/v1/outpaint", prompt="a red circle on a blue background", seed=1, **body))
    assert drawn.shape == (160, 192, 3)
    np.testing.assert_array_equal(drawn[:112, 80:], scene[:112, 16:])
    assert drawn[:, :56].std() > 0
    assert drawn[:128, :48, 2].mean() > drawn[:128, :48, 1].mean(), "the blue background goes on"


def test_variations_stay_near_their_seed(server: Server):
    body = {"prompt": SCENE, "seed": 1, "steps": 12}
    base = picture(server.post(**body))
    answer = ask(server, "/v1/variations", **body, variation_seed=5, samples=3)
    assert [image["seed"] for image in answer.json()["images"]] == [1, 1, 1]
    near = [picture(answer, index) for index in range(3)]
    others = [picture(server.post(**body | {"seed": seed})) for seed in (20, 21, 22)]
    distances = [float(np.mean([abs(p - base).mean() for p in group])) for group in (near, others)]
    assert 0 < distances[0] < distances[1], distances
    assert abs(near[0] - near[1]).max() > 1
    again = picture(server.post(**body, variation_seed=6, variation_strength=0.2))
    assert abs(again - near[1]).max() <= 1, "picture 1 is that of the next variation seed"


def test_variations_of_a_picture_need_no_prompt(server: Server, scene: np.ndarray):
    answer = ask(server, "/v1/variations", image=text(png(scene)), seed=4, samples=2)
    assert answer.json()["parameters"]["denoise_strength"] == 0.5
    for index in range(2):
        assert 1 < abs(picture(answer, index) - scene).mean() < 60


def test_hires_draws_larger(server: Server):
    answer = server.post(prompt=SCENE, seed=1, steps=8, hires={"scale": 1.5, "steps": 4, "denoise_strength": 0.5})
    assert picture(answer).shape == (192, 192, 3)
    assert answer.json()["images"][0]["width"] == 192


def test_an_accepted_preview_is_the_picture_of_that_step(server: Server):
    body = {"prompt": SCENE, "seed": 3, "steps": 150, "width": 192, "height": 192}
    with server.stream(**body) as events:
        queued = next(events)
        assert queued.name == "queued"
        seen = [next(events) for _ in range(3)]
        answer = httpx2.post(f"{server.address}/v1/requests/{queued.data['id']}/accept", timeout=30)
        assert answer.status_code == 202, answer.text
        seen += list(events)
    *progress, image, done = seen
    assert done.name == "done"
    assert done.data["id"] == queued.data["id"]
    last = progress[-1].data["step"]
    assert last < 150
    stopped = server.post(**body, stop_at_step=last)
    assert abs(decode(base64.b64decode(image.data["base64"])) - picture(stopped)).max() <= 1
    late = httpx2.post(f"{server.address}/v1/requests/{queued.data['id']}/accept", timeout=30)
    assert late.status_code == 404


def test_a_cancelled_request_ends_with_an_error(server: Server):
    with server.stream(prompt=SCENE, steps=150, width=192, height=192) as events:
        id = next(events).data["id"]
        next(events)
        answer = httpx2.post(f"{server.address}/v1/requests/{id}/cancel", timeout=30)
        assert answer.status_code == 202, answer.text
        last = list(events)[-1]
    assert last.name == "error"
    assert last.data["error"]["code"] == "cancelled"


def test_the_command_line_paints(server: Server, scene: np.ndarray, hole: np.ndarray, tmp_path: Path):
    for name, pixels in (("photo", scene), ("mask", hole)):
        (tmp_path / f"{name}.png").write_bytes(png(pixels))
    common = ["-i", tmp_path / "photo.png", "-a", server.address, "--steps", 8, "--seed", 2]

    def heliograph(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "app.cli", "generate", *map(str, (*arguments, *common))]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=200)

    painted, grown = tmp_path / "painted.png", tmp_path / "grown.png"
    ran = heliograph("a green square", "--mask", tmp_path / "mask.png", "--mask-blur", 2, "-o", painted)
    assert ran.returncode == 0, ran.stderr
    drawn = decode(painted.read_bytes())
    np.testing.assert_array_equal(drawn[far(hole)], scene[far(hole)])
    assert abs(drawn[HOLE] - scene[HOLE]).mean() > 10
    ran = heliograph("a red circle on a blue background", "--outpaint", "64,0,0,0", "-o", grown)
    assert ran.returncode == 0, ran.stderr
    assert look_at(grown) == ("PNG", (192, 128))
