"""Inpainting and outpainting: diffusers' own pictures, the prompt inside the mask, and nothing changed outside it."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from models import families
from models.card import ModelCard
from models.embedded.scoring import lab
from models.embedded.world import COLOURS
from models.engine import Engine
from models.errors import InvalidRequest
from models.images import Picture
from models.parts import Outpaint
from models.request import GenerationRequest
from models.samplers import SAMPLERS
from tests.models.conftest import FAMILIES, folder, new_engine, pipeline, reference

SIDE = 128
STEPS = 4
STRENGTHS = (1.0, 0.6)


def sketch(width: int = SIDE, height: int = SIDE) -> Picture:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Picture.from_array(coarse).resized(width, height)


def hole(box: tuple[int, int, int, int] = (32, 32, 96, 96), width: int = SIDE, height: int = SIDE) -> Picture:
    left, top, right, bottom = box
    array = np.zeros((height, width, 3), np.uint8)
    array[top:bottom, left:right] = 255
    return Picture.from_array(array)


def asked(model: str, sampler: str, strength: float, **options) -> GenerationRequest:
    """A request as diffusers' pipelines draw it: a hard mask, and nothing pasted."""
    given = {
        "model": model,
        "prompt": "a yellow star on a green background",
        "negative_prompt": "a ring",
        "prompt_syntax": "plain",
        "image": sketch(),
        "mask": hole(),
        "denoise_strength": strength,
        "mask_blur": 0,
        "paste_back": False,
        "sampler": sampler,
        "schedule": "default",
        "steps": STEPS,
        "seed": 11,
        "guidance_scale": 1.0 if sampler == "lcm" else 5.0,
    }
    return GenerationRequest(**given | options)


def drawn(engine: Engine, requests: list[GenerationRequest]) -> list[np.ndarray]:
    """Each request's first picture, all drawn together, (h, w, 3)."""
    results = engine.generate(requests)
    return [np.asarray(Image.open(io.BytesIO(finished[0].data))).astype(int) for finished in results]


def by_diffusers(request: GenerationRequest, components: dict) -> np.ndarray:
    return reference(
        "Inpaint",
        components,
        request,
        image=Image.fromarray(request.image.array()),
        mask_image=Image.fromarray(request.mask.array()).convert("L"),
        width=request.width or SIDE,
        height=request.height or SIDE,
        strength=request.denoise_strength,
        padding_mask_crop=request.mask_padding if request.mask_region == "masked" else None,
    )


def away(picture: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(picture - other).max())


# Networks of 4 channels


@pytest.fixture(scope="module")
def blended() -> dict[tuple[str, float], tuple[GenerationRequest, np.ndarray]]:
    """Every sampler at every strength, drawn in one mixed batch."""
    requests = [asked("sd15", sampler, strength) for sampler in SAMPLERS for strength in STRENGTHS]
    plain = GenerationRequest(model="sd15", prompt="a red circle", steps=STEPS, seed=1)
    pictures = drawn(new_engine("sd15"), [*requests, plain])
    return {(r.sampler, r.denoise_strength): (r, p) for r, p in zip(requests, pictures, strict=False)}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_inpaints_what_diffusers_inpaints(blended, sampler, strength):
    request, picture = blended[sampler, strength]
    assert away(picture, by_diffusers(request, pipeline("sd15").components)) <= 1


def test_sdxl_inpaints_what_diffusers_inpaints():
    requests = [asked("sdxl", sampler, strength) for sampler in ("euler_a", "dpmpp_2m") for strength in STRENGTHS]
    for request, picture in zip(requests, drawn(new_engine("sdxl"), requests), strict=True):
        assert away(picture, by_diffusers(request, pipeline("sdxl").components)) <= 1


@pytest.mark.parametrize("box", [(70, 40, 100, 60), (0, 0, 30, 100), (5, 90, 155, 110)])
def test_a_region_drawn_alone_is_what_diffusers_draws_and_pastes(box):
    cut = {"image": sketch(160, 112), "mask": hole(box, 160, 112), "mask_region": "masked", "mask_padding": 12}
    request = asked("sd15", "euler", 0.9, paste_back=True, width=SIDE, height=SIDE, **cut)
    [picture] = drawn(new_engine("sd15"), [request])
    assert picture.shape == (112, 160, 3)
    assert away(picture, by_diffusers(request, pipeline("sd15").components)) <= 1


def test_pasting_back_lays_the_picture_over_the_input(blended):
    request, picture = blended["euler", 0.6]
    [pasted] = drawn(new_engine("sd15"), [asked("sd15", "euler", 0.6, paste_back=True)])
    white = request.mask.array()[..., 0] > 0
    assert away(pasted[white], picture[white]) <= 1
    assert np.array_equal(pasted[~white], request.image.array()[~white])


def test_a_region_that_is_not_pasted_is_delivered_as_it_was_drawn():
    request = asked("sd15", "euler", 1.0, image=sketch(160, 112), mask=hole((40, 40, 80, 70), 160, 112))
    request = replace(request, mask_region="masked", steps=2)
    [picture] = drawn(new_engine("sd15"), [request])
    assert picture.shape == (SIDE, SIDE, 3)


# Networks of 9 channels


def widened(model: str, into: Path) -> Path:
    """The embedded model as an inpainting model: its UNet sees a mask and a masked picture too, by random weights."""
    shutil.copytree(folder(model), into)
    small = diffusers.UNet2DConditionModel.from_pretrained(into / "unet", torch_dtype=torch.float32)
    weights = small.state_dict()
    extra = torch.randn(weights["conv_in.weight"].shape[0], 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], 0.1 * extra], 1)
    large = diffusers.UNet2DConditionModel.from_config({**small.config, "in_channels": 9})
    large.load_state_dict(weights)
    shutil.rmtree(into / "unet")
    large.save_pretrained(into / "unet")
    return into


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def inpainting(request, tmp_path_factory) -> tuple[families.Family, ModelCard, Path]:
    model, source = request.param, tmp_path_factory.mktemp("inpainting") / request.param
    widened(model, source)
    family = families.load(family=FAMILIES[model], source=str(source), device="cpu", dtype="float32")
    return family, ModelCard.read(model, FAMILIES[model], str(source)), source


def test_inpainting_networks_draw_what_diffusers_draws(inpainting):
    family, card, source = inpainting
    model = card.name
    requests = [asked(model, sampler, strength) for sampler in ("euler_a", "ddim") for strength in STRENGTHS]
    cut = {"image": sketch(160, 112), "mask": hole((70, 40, 100, 60), 160, 112), "width": SIDE, "height": SIDE}
    requests += [asked(model, "heun", 0.8, paste_back=True, mask_region="masked", mask_padding=12, **cut)]
    components = diffusers.DiffusionPipeline.from_pretrained(source, dtype=torch.float32).components
    for request, picture in zip(requests, drawn(Engine(family, card), requests), strict=True):
        assert away(picture, by_diffusers(request, components)) <= 1


def test_inpainting_networks_do_nothing_else(inpainting):
    family, card, source = inpainting
    engine = Engine(family, card)
    engine.warm_up(cap=4)
    assert card.tasks == ("inpaint",)
    with pytest.raises(InvalidRequest, match="does inpaint, not txt2img"):
        engine.generate([GenerationRequest(model=card.name, prompt="a red circle")])
    other = ModelCard.read("other", card.family, str(source), {"tasks": ("txt2img", "inpaint")})
    with pytest.raises(InvalidRequest) as refused:
        Engine(family, other)
    assert refused.value.field == "defaults.tasks"


# Meaning


def green(width: int = SIDE, height: int = SIDE) -> Picture:
    return Picture.from_array(np.full((height, width, 3), COLOURS["green"], np.uint8))


def share(picture: np.ndarray, colour: str) -> float:
    """Of the pixels (..., 3), how many are nearer to this colour than to any other of the world."""
    names = list(COLOURS)
    distances = np.linalg.norm(lab(picture)[..., None, :] - lab(np.array(list(COLOURS.values()))), axis=-1)
    return float((distances.argmin(-1) == names.index(colour)).mean())


@pytest.mark.parametrize("fill", ["original", "fill", "noise", "nothing"])
def test_what_the_prompt_says_is_drawn_inside_the_mask_and_nothing_outside(fill):
    image, mask = green(), hole((24, 24, 104, 104))
    request = GenerationRequest(
        model="sd15",
        prompt="a large yellow circle on a green background",
        image=image,
        mask=mask,
        mask_fill=fill,
        denoise_strength=1.0 if fill == "original" else 0.9,
        steps=12,
        guidance_scale=7.0,
        seed=5,
    )
    [picture] = drawn(new_engine("sd15"), [request])
    assert share(picture[24:104, 24:104], "yellow") > 0.15
    outside = np.ones((SIDE, SIDE), bool)
    outside[12:116, 12:116] = False
    assert np.array_equal(picture[outside], image.array()[outside])


@pytest.mark.parametrize("border", [Outpaint(right=64), Outpaint(left=36, top=20, right=12, bottom=12)], ids=str)
def test_outpainting_keeps_the_picture_and_continues_its_background(border):
    request = GenerationRequest(
        model="sd15", prompt="a green background", image=green(), outpaint=border, mask_blur=2, steps=12, seed=2
    )
    [picture] = drawn(new_engine("sd15"), [request])
    assert picture.shape == (SIDE + border.top + border.bottom, SIDE + border.left + border.right, 3)
    kept = picture[border.top + 6 : border.top + SIDE - 6, border.left + 6 : border.left + SIDE - 6]
    assert (kept == COLOURS["green"]).all()
    new = np.ones(picture.shape[:2], bool)
    new[border.top : border.top + SIDE, border.left : border.left + SIDE] = False
    assert share(picture[new], "green") > 0.8


# What is refused


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"image": None, "denoise_strength": None}, "mask"),
        ({"mask": hole((0, 0, 0, 0))}, "mask"),
        ({"mask": hole(width=64)}, "mask"),
        ({"mask": None, "outpaint": Outpaint(right=3)}, "width"),
        ({"mask": None, "outpaint": Outpaint()}, "outpaint"),
    ],
)
def test_what_cannot_be_inpainted_is_refused_before_it_is_taken_on(options, field):
    engine = new_engine("sd15")
    with pytest.raises(InvalidRequest) as refused:
        engine.submit(asked("sd15", "euler", 1.0, **options), lambda event: None)
    assert refused.value.field == field
