"""The real upscaler: it sleeps until it is asked, enlarges what the models drew, and serves the command line."""

import base64
import io
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
from PIL import Image

from tests.acceptance.conftest import Server, look_at
from tests.acceptance.test_cli import heliograph


def drawn(server: Server) -> bytes:
    [image] = server.post(prompt="a red circle on a blue background", seed=7, steps=12).json()["images"]
    return base64.b64decode(image["base64"])


def upscaled(server: Server, picture: bytes, **form: str) -> httpx2.Response:
    files = {"image": ("in.png", picture, "image/png")}
    return httpx2.post(
        f"{server.address}/v1/upscale", files=files, data=form, headers={"Accept": "image/png"}, timeout=300
    )


def test_it_wakes_and_enlarges_what_was_drawn(server: Server):
    small = drawn(server)
    answer = upscaled(server, small, scale="4", model="4x")
    assert answer.status_code == 200, answer.text
    assert (answer.headers["x-model"], answer.headers["x-size"]) == ("4x", "512x512")
    large = Image.open(io.BytesIO(answer.content)).convert("RGB")
    back = np.asarray(large.resize((128, 128), Image.Resampling.BOX)).astype(int)
    assert np.abs(back - np.asarray(Image.open(io.BytesIO(small)))).mean() < 4


def test_what_a_model_draws_goes_on_to_the_upscaler(server: Server):
    answer = server.post(
        prompt="a red circle", seed=7, steps=8, samples=2, upscale={"scale": 2}, output_format="jpeg", metadata="full"
    )
    assert answer.status_code == 200, answer.text
    pictures = [base64.b64decode(image["base64"]) for image in answer.json()["images"]]
    for i, picture in enumerate(pictures):
        assert Image.open(io.BytesIO(picture)).size == (256, 256)
        told = httpx2.post(f"{server.address}/v1/metadata", content=picture, timeout=30).json()["parameters"]
        assert told["upscale"] == {"scale": 2, "model": "2x"}
        assert (told["seed"], told["output_format"]) == (7 + i, "jpeg")
    redrawn = httpx2.post(f"{server.address}/v1/generate", json=told, timeout=300).json()["images"][0]
    again = base64.b64decode(redrawn["base64"])
    first, second = (np.asarray(Image.open(io.BytesIO(p))).astype(int) for p in (pictures[-1], again))
    assert np.abs(first - second).mean() < 0.5  # the drawing is within 1/255, and JPEG rounds


def test_a_client_that_leaves_stops_the_work(server: Server):
    """The next picture does not wait for what nobody waits for: a large one would take minutes."""
    buffer = io.BytesIO()
    Image.new("RGB", (3900, 3900)).save(buffer, "PNG")
    upscaled(server, drawn(server))  # awake
    left = threading.Thread(target=_leave, args=(server, buffer.getvalue()))
    left.start()
    left.join()
    started = time.monotonic()
    assert upscaled(server, drawn(server), model="lanczos").status_code == 200
    assert time.monotonic() - started < 30


def _leave(server: Server, picture: bytes) -> None:
    files = {"image": ("in.png", picture, "image/png")}
    try:
        httpx2.post(f"{server.address}/v1/upscale", files=files, data={"model": "2x"}, timeout=3)
    except httpx2.TimeoutException:
        return
    raise AssertionError("it was quicker than this test expects")


def test_the_command_enlarges_through_the_server_and_alone(server: Server, tmp_path: Path):
    (tmp_path / "in.png").write_bytes(drawn(server))
    for name, options in (("served.webp", ["-a", server.address]), ("local.webp", ["--local"])):
        ran = heliograph("upscale", tmp_path / "in.png", "-o", tmp_path / name, "--scale", 1.5, *options)
        assert ran.returncode == 0, ran.stderr
        assert look_at(tmp_path / name) == ("WEBP", (192, 192))
    assert (tmp_path / "served.webp").read_bytes() == (tmp_path / "local.webp").read_bytes()
    for options, words in ((["--scale", 9], "between 1.0 and 8.0"), (["--model", "nope"], "lanczos, 2x, 4x")):
        for where in (["-a", server.address], ["--local"]):
            ran = heliograph("upscale", tmp_path / "in.png", *options, *where)
            assert ran.returncode == 1
            assert words in ran.stderr
