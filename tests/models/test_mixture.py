"""Acceptance: everything the craft knows in one batch, and each picture as if it were alone."""

import functools
from pathlib import Path

import numpy as np
import pytest

from models.engine import Engine
from models.images import Picture
from models.parts import AdapterUse, ControlUse, Hires
from models.registered import Adapters
from models.request import GenerationRequest
from tests.models.conftest import drawn, loaded_family, new_engine, sketch

EMBEDDED = Path("models/embedded")


def engine() -> Engine:
    canny = {"canny": EMBEDDED / "controlnets" / "canny-sd15"}
    return new_engine("sd15", adapters=Adapters(loaded_family("sd15"), EMBEDDED / "loras", canny))


def square_mask() -> Picture:
    mask = np.zeros((128, 128, 3), np.uint8)
    mask[32:96, 32:96] = 255
    return Picture.from_array(mask)


def mixture() -> dict[str, GenerationRequest]:
    """One request of each kind, with samplers, guidance and prompts of their own."""
    control = ControlUse(name="canny", image=sketch(), preprocessor="canny", weight=0.8, end=0.7)
    ask = functools.partial(GenerationRequest, model="sd15", steps=6, sampler="euler_a")
    crescent, framed = AdapterUse(name="crescent", weight=0.9), AdapterUse(name="framed", weight=0.6)
    prompt = "a red circle on a blue background"
    long = "a (red:1.2) circle on a [blue:green:0.5] background, " * 12
    return {
        "plain": ask(prompt=prompt, seed=1, sampler="dpmpp_2m"),
        "long": ask(prompt=long, seed=2, guidance_scale=4.0),
        "inpaint": ask(prompt="a yellow star", seed=3, image=sketch(), mask=square_mask(), sampler="heun"),
        "control": ask(prompt=prompt, seed=4, controls=(control,), sampler="ddim"),
        "one lora": ask(prompt="a red moon on a blue background", seed=5, adapters=(crescent,), sampler="unipc"),
        "other lora": ask(prompt=prompt, seed=6, adapters=(framed,)),
        "everything": ask(
            prompt=prompt, seed=7, image=sketch(), mask=square_mask(), controls=(control,), adapters=(crescent, framed)
        ),
        "hires": ask(prompt=prompt, seed=8, hires=Hires(scale=1.5, steps=4), adapters=(framed,), controls=(control,)),
        "unguided": ask(prompt=prompt, seed=9, guidance_scale=1.0, image=sketch(), denoise_strength=0.6),
    }


@pytest.fixture(scope="module")
def together() -> tuple[dict[str, np.ndarray], int]:
    """Each one's picture of one batch, and the forwards it took."""
    requests, shared = mixture(), engine()
    shared.batcher.set_cap((4, 16, 16), 64)
    results = shared.generate(requests.values())
    pictures = {name: drawn(one.data) for name, [one] in zip(requests, results, strict=True)}
    return pictures, shared.load().forwards


@pytest.mark.parametrize("kind", mixture())
def test_each_gets_the_picture_it_gets_alone(together, kind):
    [[alone]] = engine().generate([mixture()[kind]])
    assert np.abs(drawn(alone.data) - together[0][kind]).max() <= 1


def test_they_shared_their_forwards(together):
    longest = 11  # Heun's two evaluations a step, save the last; hires goes on for 3 at its own size
    assert together[1] <= longest + 3


def test_what_is_kept_is_kept(together):
    outside = np.asarray(square_mask().array())[..., 0] == 0
    outside[20:108, 20:108] = False  # the mask's blur
    for kind in ("inpaint", "everything"):
        assert (together[0][kind][outside] == sketch().array()[outside]).all()
