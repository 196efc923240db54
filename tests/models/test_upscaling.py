"""The models that make pictures larger: diffusers' own pictures, alone and mixed, of any size, and what is refused."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from models import families
from models.card import ModelCard
from models.engine import Engine
from models.errors import InvalidRequest
from models.images import Picture
from models.parts import ControlUse, Hires
from models.request import GenerationRequest, warm_up_request
from models.samplers import SAMPLERS, SCHEDULES
from tests.models.conftest import drawn
from tests.models.upscaling_models import pipeline, save, spoiled

SIDES = {"sd_x4": 16, "sd_x2": 64}  # of the pictures that are made larger
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return {family: save(family, tmp_path_factory.mktemp(family)) for family in SIDES}


@pytest.fixture(scope="module")
def engine(folders: Folders) -> Callable[[str], Engine]:
    @cache
    def made(family: str) -> Engine:
        folder = str(folders[family])
        loaded = families.load(family=family, source=folder, device="cpu", dtype="float32")
        return Engine(loaded, ModelCard.read(family, family, folder, {"max_pixels": 256 * 256}))

    return made


@pytest.fixture(scope="module")
def by_diffusers(folders: Folders) -> Callable[[GenerationRequest], np.ndarray]:
    pipe = cache(lambda family: pipeline(family, folders[family]))

    def draw(request: GenerationRequest) -> np.ndarray:
        one, named = pipe(request.model), SAMPLERS[request.sampler]
        config = dict(one.scheduler.config) | dict(named.options) | dict(SCHEDULES[request.schedule])
        scheduler = getattr(diffusers, named.scheduler).from_config(config)
        parts = one.components | {"scheduler": scheduler}
        fresh = type(one)(**{name: part for name, part in parts.items() if part is not None})
        fresh.set_progress_bar_config(disable=True)
        options = {} if request.noise_level is None else {"noise_level": request.noise_level}
        images = fresh(
            request.prompt,
            image=Image.fromarray(request.image.array()),
            negative_prompt=request.negative_prompt or None,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            **options,
        ).images
        return np.asarray(images[0]).astype(int)

    return draw


def scene(width: int, height: int, seed: int = 0) -> Picture:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Picture.from_array(coarse).resized(width, height)


def asked(family: str, **options: object) -> GenerationRequest:
    given = {
        "model": family,
        "prompt": "a yellow star on a green background",
        "prompt_syntax": "plain",
        "image": scene(SIDES[family], SIDES[family]),
        "sampler": "euler",
        "schedule": "default",
        "steps": 5,
        "seed": 11,
        "guidance_scale": 4.0,
    }
    return GenerationRequest(**given | options)


def together(engine: Engine, requests: list[GenerationRequest]) -> list[np.ndarray]:
    return [drawn(finished[0].data) for finished in engine.generate(requests)]


def away(picture: np.ndarray, other: np.ndarray) -> int:
    assert picture.shape == other.shape
    return int(np.abs(picture - other).max())


REQUESTS = {
    "sd_x4": [
        asked("sd_x4", sampler="ddim", noise_level=20),
        asked("sd_x4", sampler="ddim", noise_level=0, steps=7, seed=3, prompt="a red ring"),
        asked("sd_x4", sampler="dpmpp_2m", noise_level=350, negative_prompt="a ring"),
        asked("sd_x4", sampler="dpmpp_2m", schedule="karras", noise_level=75, guidance_scale=1.0),
        asked("sd_x4", sampler="euler_a", noise_level=120, seed=5),
        asked("sd_x4", sampler="pndm", noise_level=20, guidance_scale=9.0, steps=6, image=scene(16, 16, seed=1)),
        asked("sd_x4", sampler="ddpm", noise_level=20, prompt="", seed=2),
    ],
    "sd_x2": [
        asked("sd_x2"),
        asked("sd_x2", schedule="karras", steps=7, seed=3, prompt="a red ring"),
        asked("sd_x2", schedule="exponential", guidance_scale=1.0),
        asked("sd_x2", schedule="sgm_uniform", negative_prompt="a ring", image=scene(64, 64, seed=1)),
        asked("sd_x2", schedule="beta", guidance_scale=9.0, prompt="", seed=2),
    ],
}


@pytest.fixture(scope="module")
def pictures(engine: Callable[[str], Engine]) -> dict[str, list[np.ndarray]]:
    """All requests of a family, drawn in one batch."""
    return {family: together(engine(family), requests) for family, requests in REQUESTS.items()}


@pytest.mark.parametrize(
    ("family", "index"), [(f, i) for f, requests in REQUESTS.items() for i in range(len(requests))]
)
def test_a_request_among_others_draws_what_diffusers_draws(pictures, by_diffusers, family: str, index: int):
    picture, request = pictures[family][index], REQUESTS[family][index]
    assert picture.std() > 10
    assert away(picture, by_diffusers(request)) <= 1


@pytest.mark.parametrize("family", SIDES)
def test_a_batch_shares_its_forwards(engine: Callable[[str], Engine], family: str):
    one = engine(family)
    before = one.load().forwards
    long = "a star and " * 40  # more than one chunk, so that the others' contexts are padded
    prompts = {3: "a ring", 4: "a star", 5: long}
    requests = [asked(family, steps=steps, seed=steps, prompt=prompt) for steps, prompt in prompts.items()]
    mixed = together(one, requests)
    assert one.load().forwards - before == 5
    for request, picture in zip(requests, mixed, strict=True):
        assert away(picture, together(one, [request])[0]) <= 1


def test_each_field_counts(engine: Callable[[str], Engine]):
    """Or the pictures would be equal to diffusers' for want of anything in them."""
    base = {"guidance_scale": 9.0, "sampler": "ddim"}
    variants = [{}, {"noise_level": 300}, {"prompt": "a red ring"}, {"seed": 12}, {"image": scene(16, 16, seed=1)}]
    first, *others = together(engine("sd_x4"), [asked("sd_x4", **base | variant) for variant in variants])
    assert [away(first, other) > 3 for other in others] == [True] * 4
    variants = [{}, {"prompt": "a red ring"}, {"seed": 12}, {"image": scene(64, 64, seed=1)}]
    first, *others = together(engine("sd_x2"), [asked("sd_x2", guidance_scale=9.0, **variant) for variant in variants])
    assert [away(first, other) > 3 for other in others] == [True] * 3


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun", "lms", "dpm2", "unipc"])
def test_every_kind_of_sampler_ends_where_euler_does(engine: Callable[[str], Engine], sampler: str):
    """diffusers' latent upscaler runs with Euler alone; with many steps the others have to agree with it."""
    many = {"steps": 30, "guidance_scale": 1.0}
    variants = [{}, {"sampler": sampler}, {"seed": 12}]
    euler, other, stranger = together(engine("sd_x2"), [asked("sd_x2", **many | variant) for variant in variants])
    assert np.abs(euler - other).mean() < 4 < np.abs(euler - stranger).mean() / 4


@pytest.mark.parametrize(("family", "size"), [("sd_x4", (23, 17)), ("sd_x2", (33, 70))])
def test_a_picture_of_any_size_is_continued_and_cut_off_again(
    engine: Callable[[str], Engine], by_diffusers, family: str, size: tuple[int, int]
):
    one, image = engine(family), scene(*size)
    request = asked(family, image=image)
    [picture] = together(one, [request])
    scale = one.card.upscaling.scale
    assert picture.shape == (scale * size[1], scale * size[0], 3)
    whole = asked(family, image=image.continued(one.family.multiple, one.family.least))
    assert away(picture, by_diffusers(whole)[: picture.shape[0], : picture.shape[1]]) <= 1


def test_the_defaults_are_those_of_the_family(engine: Callable[[str], Engine]):
    for family, level, steps, sampler in (("sd_x4", 20, 75, "ddim"), ("sd_x2", 0, 20, "euler")):
        card = engine(family).card
        request = GenerationRequest(model=family, prompt="", image=scene(40, 32)).resolve(card)
        assert (card.tasks, request.task, request.noise_level) == (("upscale",), "upscale", level)
        assert (request.steps, request.sampler, request.schedule) == (steps, sampler, "default")
        assert (request.width, request.height) == (40 * card.upscaling.scale, 32 * card.upscaling.scale)
        assert request.resolve(card) is request


@pytest.mark.parametrize("family", SIDES)
def test_a_model_warms_up(engine: Callable[[str], Engine], family: str):
    one = engine(family)
    [[finished]] = one.generate([warm_up_request(one.card, steps=2)])
    assert (finished.width, finished.height) == (one.card.width, one.card.height)


@pytest.mark.parametrize(
    ("family", "wrong", "field", "word"),
    [
        ("sd_x4", {"image": None}, "image", "is required"),
        ("sd_x4", {"noise_level": 351}, "noise_level", "between 0 and 350"),
        ("sd_x4", {"noise_level": -1}, "noise_level", "between 0 and 350"),
        ("sd_x2", {"noise_level": 20}, "noise_level", "must be left out or 0"),
        ("sd_x4", {"image": scene(65, 64)}, "image", "65x64 becomes 260x256; allowed .* 65536 pixels"),
        ("sd_x4", {"image": scene(15, 64)}, "image", "sides of 64 to 8192"),
        ("sd_x2", {"image": scene(31, 64)}, "image", "sides of 64 to 8192"),
        ("sd_x4", {"width": 128}, "width", "must be left out or 64"),
        ("sd_x4", {"denoise_strength": 0.5}, "denoise_strength", "drawn anew"),
        ("sd_x4", {"mask": scene(16, 16)}, "mask", "does upscale, not inpaint"),
        ("sd_x4", {"hires": "scale"}, "hires", "makes pictures larger"),
        ("sd_x4", {"controls": "canny"}, "controls", "makes pictures larger"),
    ],
    ids=str,
)
def test_what_such_a_model_cannot_do_is_refused_before_work(
    engine: Callable[[str], Engine], family: str, wrong: dict, field: str, word: str
):
    parts = {"scale": Hires(), "canny": (ControlUse(name="canny", image=scene(16, 16)),)}
    wrong = {name: parts.get(value, value) if isinstance(value, str) else value for name, value in wrong.items()}
    with pytest.raises(InvalidRequest, match=word) as refused:
        engine(family).submit(asked(family, **wrong), print)
    assert refused.value.field == field
    assert engine(family).load().waiting == 0


def test_a_noise_level_is_for_upscaling_models_alone():
    card = ModelCard.read("sd15", "sd", "models/embedded/sd15")
    request = GenerationRequest(model="sd15", prompt="x", image=scene(128, 128), noise_level=20)
    with pytest.raises(InvalidRequest, match="does txt2img, img2img, inpaint, not upscale") as refused:
        request.resolve(card)
    assert refused.value.field == "noise_level"


def test_tasks_are_the_familys(folders: Folders):
    for family, source, tasks in (
        ("sd_x4", folders["sd_x4"], ["img2img"]),
        ("sd", "models/embedded/sd15", ["upscale"]),
    ):
        with pytest.raises(InvalidRequest, match="does") as refused:
            ModelCard.read("one", family, str(source), {"tasks": tasks})
        assert refused.value.field == "defaults.tasks"


def test_a_card_of_a_hub_id_needs_no_files():
    card = ModelCard.read("x4", "sd_x4", "someone/an-upscaler", {"width": 512, "max_pixels": 2048 * 2048})
    assert (card.tasks, card.upscaling.scale, card.guidance_scale) == (("upscale",), 4, 9.0)


@pytest.mark.parametrize(("family", "other"), [("sd_x4", "sd_x2"), ("sd_x2", "sd_x4")])
def test_another_familys_folder_is_refused(folders: Folders, family: str, other: str):
    with pytest.raises(InvalidRequest) as refused:
        families.load(family=family, source=str(folders[other]), device="cpu")
    assert refused.value.field in ("source", "location")


def test_a_unet_that_knows_too_few_levels_of_noise_is_refused(folders: Folders, tmp_path: Path):
    few = save("sd_x4", tmp_path / "few", num_class_embeds=100)
    with pytest.raises(InvalidRequest, match="350 levels of noise") as refused:
        families.load(family="sd_x4", source=str(few), device="cpu")
    assert refused.value.field == "source"
    odd = spoiled(folders["sd_x4"], tmp_path / "odd", '"in_channels": 7', '"in_channels": 4')
    with pytest.raises(InvalidRequest):
        families.load(family="sd_x4", source=str(odd), device="cpu")
