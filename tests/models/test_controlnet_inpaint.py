"""ControlNets and inpainting in one request: diffusers' own pictures, of the whole picture and of the masked region."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from models import families
from models.card import ModelCard
from models.engine import Engine
from models.images import Picture
from models.parts import ControlUse
from models.registered import Adapters
from models.request import GenerationRequest
from tests.models.conftest import FAMILIES, drawn, loaded_family, new_engine, pipeline, reference, sketch
from tests.models.test_inpaint import asked, hole, widened

MODELS = ("sd15", "sdxl")


def canny(model: str) -> Path:
    return Path(f"models/embedded/controlnets/canny-{model}")


def frame(width: int, height: int) -> Picture:
    """The outline of a rectangle, off the middle, as white on black."""
    hint = np.zeros((height, width, 3), np.uint8)
    hint[height // 5 : height // 2, width // 3 : width // 5 * 4] = 255
    hint[height // 5 + 2 : height // 2 - 2, width // 3 + 2 : width // 5 * 4 - 2] = 0
    return Picture.from_array(hint)


def cases(model: str) -> dict[str, GenerationRequest]:
    """The whole picture, and the masked region of one that is not square, with a mask that is in its corner."""
    wide = {"image": sketch().resized(160, 112), "mask": hole((70, 20, 130, 60), 160, 112), "width": 128, "height": 128}
    region = wide | {"mask_region": "masked", "mask_padding": 12, "paste_back": True}
    use = ControlUse(name="canny", image=frame(160, 112), weight=0.9)
    corner = {"mask": hole((0, 0, 30, 100), 160, 112)}
    return {
        "whole": asked(model, "euler_a", 1.0, controls=(replace(use, image=frame(128, 128), end=0.8),)),
        "whole, another size": asked(model, "ddim", 0.6, controls=(replace(use, image=frame(96, 64)),)),
        "masked": asked(model, "euler_a", 1.0, controls=(use,), **region),
        "masked, in a corner": asked(model, "dpmpp_2m", 0.8, controls=(use,), **region | corner),
        "whole, two": asked(model, "ddim", 0.9, controls=(use, replace(use, image=sketch(), weight=0.5, start=0.3))),
    }


def by_diffusers(request: GenerationRequest, parts: dict[str, object]) -> np.ndarray:
    nets = [diffusers.ControlNetModel.from_pretrained(canny(request.model)).eval() for _ in request.controls]
    one = len(nets) == 1
    hints = [Image.fromarray(use.image.array()) for use in request.controls]
    weights = [use.weight for use in request.controls]
    return reference(
        "ControlNetInpaint",
        parts | {"controlnet": nets[0] if one else nets},
        request,
        image=Image.fromarray(request.image.array()),
        mask_image=Image.fromarray(request.mask.array()).convert("L"),
        control_image=hints[0] if one else hints,
        controlnet_conditioning_scale=weights[0] if one else weights,
        control_guidance_start=[use.start for use in request.controls],
        control_guidance_end=[use.end for use in request.controls],
        width=request.width or 128,
        height=request.height or 128,
        strength=request.denoise_strength,
        padding_mask_crop=request.mask_padding if request.mask_region == "masked" else None,
    )


def adapters(family: families.Family, model: str) -> Adapters:
    return Adapters(family, controlnets={"canny": canny(model)})


@pytest.fixture(scope="module")
def together() -> dict[str, dict[str, np.ndarray]]:
    """All of each model's cases, drawn in one mixed batch."""
    pictures = {}
    for model in MODELS:
        results = new_engine(model, adapters=adapters(loaded_family(model), model)).generate(cases(model).values())
        pictures[model] = {name: drawn(one.data) for name, [one] in zip(cases(model), results, strict=True)}
    return pictures


@pytest.mark.parametrize("name", cases("sd15"))
@pytest.mark.parametrize("model", MODELS)
def test_it_draws_what_diffusers_draws(together, model, name):
    expected = by_diffusers(cases(model)[name], dict(pipeline(model).components))
    assert together[model][name].shape == expected.shape
    assert np.abs(together[model][name] - expected).max() <= 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["whole", "masked"])
def test_the_hint_acts_inside_the_mask(together, model, name):
    [[plain]] = new_engine(model).generate([replace(cases(model)[name], controls=())])
    assert np.abs(together[model][name] - drawn(plain.data)).max() > 30


@pytest.mark.parametrize("model", MODELS)
def test_inpainting_networks_follow_hints_as_diffusers_has_them(model, tmp_path):
    source = widened(model, tmp_path / model)
    family = families.load(family=FAMILIES[model], source=str(source), device="cpu", dtype="float32")
    card = ModelCard.read(model, FAMILIES[model], str(source))
    parts = diffusers.DiffusionPipeline.from_pretrained(source, dtype=torch.float32).components
    wanted = [cases(model)[name] for name in ("whole", "masked")]
    pictures = Engine(family, card, adapters=adapters(family, model)).generate(wanted)
    for request, [finished] in zip(wanted, pictures, strict=True):
        assert np.abs(drawn(finished.data) - by_diffusers(request, parts)).max() <= 1
