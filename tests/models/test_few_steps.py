"""Few-step models draw what diffusers' pipelines draw, with one row to a picture, alone and among neighbours."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from models.card import ModelCard
from models.engine import Engine
from models.errors import InvalidRequest
from models.events import Failed, Finished, Progress
from models.family import Conditioning, with_guidance
from models.images import Picture
from models.parts import AdapterUse, ControlUse, Hires
from models.request import GenerationRequest
from models.work import work
from tests.models.conftest import FAMILIES, drawn, folder, pipeline, reference, sketch
from tests.models.few_step_models import LORAS, by_diffusers, engine, latent_consistency, scheduled

CANNY = "models/embedded/controlnets/canny-sd15"
SCALES = (1.0, 3.5, 8.5, 0.0, 20.0)


@pytest.fixture(scope="module")
def lcm(tmp_path_factory) -> dict[str, Path]:
    """Latent consistency models with a layer for the guidance scale."""
    root = tmp_path_factory.mktemp("lcm")
    return {base: latent_consistency(base, root / base) for base in ("sd15", "sdxl")}


def ask(model: str, **fields) -> GenerationRequest:
    return GenerationRequest(**{"model": model, "prompt": "a red circle on a blue background", "seed": 1} | fields)


def told(engine: Engine, requests: Sequence[GenerationRequest]) -> tuple[list[np.ndarray], list[Progress]]:
    """Each request's picture, drawn together, and everybody's progress."""
    ends = (Finished, Failed)
    events: list[list[object]] = [[] for _ in requests]
    for request, heard in zip(requests, events, strict=True):
        engine.submit(request, heard.append)
    until = time.monotonic() + 120
    while not all(heard and isinstance(heard[-1], ends) for heard in events):
        assert time.monotonic() < until
        engine.step()
    pictures = [drawn(event.data) for heard in events for event in heard if isinstance(event, Finished)]
    return pictures, [event for heard in events for event in heard if isinstance(event, Progress)]


def one_row_each(progress: Sequence[Progress]) -> bool:
    """Whether every forward had as many rows as pictures took part in it."""
    pictures = Counter(event.forward for event in progress)
    return all(pictures[event.forward] == event.rows for event in progress)


def theirs(pipe: diffusers.DiffusionPipeline, request: GenerationRequest, **options: object) -> np.ndarray:
    [image] = pipe(
        request.prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        **options,
    ).images
    return np.asarray(image).astype(int)


def assert_same(ours: np.ndarray, others: np.ndarray, about: object) -> None:
    assert others.std() > 5, f"{about}: nothing to see"
    difference = np.abs(ours - others).max()
    assert difference <= 1, f"{about}: {difference}/255 away"


# Latent consistency models: the guidance scale is an input


@pytest.mark.parametrize("width", [2 * 128, 64, 33])
def test_the_network_is_told_the_scale_in_diffusers_numbers(width: int):
    plain = Conditioning(context=torch.zeros(3, 2), added={"time_ids": torch.ones(6)})
    for scale in (*SCALES, 7.3):
        expected = pipeline("sd15").get_guidance_scale_embedding(torch.tensor(scale - 1).repeat(1), width)
        row = with_guidance(plain, scale, width)
        assert torch.equal(row.added["timestep_cond"], expected[0])
        assert torch.equal(row.added["time_ids"], plain.added["time_ids"])


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_pictures_of_different_scales_share_forwards_and_are_diffusers(lcm, base: str):
    asked = [ask(base, steps=4, guidance_scale=scale, seed=seed) for seed, scale in enumerate(SCALES)]
    asked.append(ask(base, steps=4, guidance_scale=8.5, seed=9, prompt="a (green:1.2) star " * 20))
    together, progress = told(engine(base, lcm[base]), asked)
    assert one_row_each(progress)
    assert len({event.forward for event in progress}) == 4
    for request, picture in zip(asked, together, strict=True):
        [alone], apart = told(engine(base, lcm[base]), [request])
        assert one_row_each(apart)
        assert_same(picture, alone, request.guidance_scale)
    for request, picture in zip(asked[:-1], together, strict=False):
        assert_same(picture, theirs(by_diffusers(lcm[base]), request), request.guidance_scale)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_the_scale_counts(lcm, base: str):
    asked = [ask(base, steps=4, guidance_scale=scale) for scale in (1.0, 8.5)]
    first, second = told(engine(base, lcm[base]), asked)[0]
    assert np.abs(first - second).max() > 20


@pytest.mark.parametrize("sampler", ["lcm", "tcd", "ddim", "euler", "dpmpp_2m", "heun"])
def test_such_a_network_runs_with_other_samplers_too(lcm, sampler: str):
    request = ask("sd15", steps=3, guidance_scale=6.0, sampler=sampler, schedule="default")
    [picture], progress = told(engine("sd15", lcm["sd15"]), [request])
    assert one_row_each(progress)
    parts = by_diffusers(lcm["sd15"]).components
    assert_same(picture, reference("", _without_projector(parts), request), sampler)


def _without_projector(parts: dict[str, object]) -> dict[str, object]:
    return {name: part for name, part in parts.items() if name != "image_encoder"}


def test_from_a_picture(lcm):
    asked = [
        ask("sd15", steps=4, guidance_scale=scale, image=sketch(), denoise_strength=0.5, sampler="lcm", seed=seed)
        for seed, scale in enumerate((2.0, 9.0))
    ]
    asked = [replace(request, schedule="default") for request in asked]
    pictures, progress = told(engine("sd15", lcm["sd15"]), asked)
    assert one_row_each(progress)
    parts = _without_projector(by_diffusers(lcm["sd15"]).components)
    for request, picture in zip(asked, pictures, strict=True):
        image = Image.fromarray(sketch().array())
        assert_same(picture, reference("Img2Img", parts, request, image=image, strength=0.5), request.guidance_scale)


def test_with_a_controlnet(lcm):
    control = ControlUse(name="canny", image=sketch(), weight=0.8)
    asked = [
        ask("sd15", steps=4, guidance_scale=scale, sampler="lcm", schedule="default", controls=(control,), seed=seed)
        for seed, scale in enumerate((2.0, 9.0))
    ]
    pictures, progress = told(engine("sd15", lcm["sd15"], {"canny": CANNY}), asked)
    assert one_row_each(progress)
    net = diffusers.ControlNetModel.from_pretrained(CANNY, dtype=torch.float32).eval()
    parts = _without_projector(by_diffusers(lcm["sd15"]).components) | {"controlnet": net}
    for request, picture in zip(asked, pictures, strict=True):
        hint = {"image": Image.fromarray(sketch().array()), "controlnet_conditioning_scale": 0.8}
        expected = reference("ControlNet", parts, request, height=128, width=128, **hint)
        assert_same(picture, expected, request.guidance_scale)


def test_every_kind_of_picture_in_one_batch(lcm):
    below = np.zeros((128, 128, 3), np.uint8)
    below[64:] = 255
    asked = [
        ask("sd15", guidance_scale=3.0),
        ask("sd15", guidance_scale=12.0, steps=2, hires=Hires(scale=1.5, steps=3)),
        ask("sd15", guidance_scale=5.0, steps=6, image=sketch(), denoise_strength=0.5),
        ask("sd15", guidance_scale=7.0, image=sketch(), mask=Picture.from_array(below), sampler="euler_a"),
        ask("sd15", prompt="a [red:blue:0.5] (circle:1.3)", adapters=(AdapterUse(name="framed"),)),
    ]
    own = engine("sd15", lcm["sd15"])
    together, progress = told(own, asked)
    assert one_row_each(progress)
    for request, picture in zip(asked, together, strict=True):
        assert_same(picture, told(own, [request])[0][0], request.prompt)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_the_card_tells_such_a_model_by_its_folder(lcm, base: str):
    card = ModelCard.read(base, FAMILIES[base], str(lcm[base]))
    assert card.guidance_input
    assert (card.steps, card.guidance_scale, card.sampler, card.schedule) == (4, 8.5, "lcm", "default")
    own = ModelCard.read(base, FAMILIES[base], str(lcm[base]), {"steps": 8, "sampler": "DPM++ 2M Karras"})
    assert (own.steps, own.guidance_scale, own.sampler, own.schedule) == (8, 8.5, "dpmpp_2m", "karras")
    assert not ModelCard.read(base, FAMILIES[base], folder(base)).guidance_input
    assert ModelCard.read(base, FAMILIES[base], "some/where", {"width": 512, "guidance_input": True}).sampler == "lcm"


def test_a_card_that_says_otherwise_is_refused(lcm):
    for where, says, hint in ((lcm["sd15"], False, "say true"), (Path(folder("sd15")), True, "say false")):
        with pytest.raises(InvalidRequest, match=hint) as refused:
            engine("sd15", where, guidance_input=says)
        assert refused.value.field == "defaults.guidance_input"


def test_what_it_costs_is_known_before(lcm):
    own = engine("sd15", lcm["sd15"])
    for options in ({}, {"guidance_scale": 1.0}, {"hires": Hires(scale=1.5)}):
        effective = ask("sd15", **options).resolve(own.card)
        assert not effective.guided
        sequences = own._preparation.sequences(effective, "", time.monotonic())
        assert work(effective) == pytest.approx(sum(sequence.work for sequence in sequences), rel=1e-9)
    unguided = ask("sd15", steps=4, guidance_scale=1.0, sampler="lcm").resolve(ModelCard.read("sd15", "sd", "", SIZE))
    assert work(ask("sd15").resolve(own.card)) == pytest.approx(work(unguided))


SIZE = {"width": 128}


def test_who_has_resolved_a_request_for_another_card_is_put_right(lcm):
    card, own = ModelCard.read("sd15", "sd", folder("sd15")), ModelCard.read("sd15", "sd", str(lcm["sd15"]))
    effective = ask("sd15", guidance_scale=4.0).resolve(card)
    assert effective.guided
    assert not effective.resolve(own).guided
    assert effective.resolve(own).resolve(card) == effective


def test_a_negative_prompt_has_no_part_and_the_answer_says_so(lcm):
    own = engine("sd15", lcm["sd15"])
    [[plain]] = own.generate([ask("sd15")])
    [[finished]] = own.generate([ask("sd15", negative_prompt="a ring")])
    assert finished.data == plain.data
    assert plain.warnings == ()
    [warning] = finished.warnings
    assert "negative_prompt plays no part" in warning
    assert "guidance scale" in warning


@pytest.mark.parametrize(
    ("field", "options"),
    [("guidance_rescale", {"guidance_rescale": 0.5}), ("prompt", {"prompt": "a circle AND a star"})],
)
def test_what_needs_an_unconditional_row_is_refused(lcm, field: str, options: dict[str, object]):
    with pytest.raises(InvalidRequest, match="unconditional row") as refused:
        ask("sd15", **options).resolve(ModelCard.read("sd15", "sd", str(lcm["sd15"])))
    assert refused.value.field == field


def test_more_steps_than_it_was_distilled_from_are_refused(lcm):
    with pytest.raises(InvalidRequest, match="51 steps") as refused:
        engine("sd15", lcm["sd15"]).submit(ask("sd15", steps=51), lambda event: None)
    assert refused.value.field == "steps"


# Models that draw without guidance: Turbo, Lightning, Hyper-SD

FOLDERS = {
    "sd-turbo": ("sd15", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "sdxl-turbo": ("sdxl", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "lightning": ("sdxl", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "lightning, 1 step": (
        *("sdxl", "EulerDiscreteScheduler"),
        {"timestep_spacing": "trailing", "prediction_type": "sample"},
    ),
    "hyper": ("sd15", "DDIMScheduler", {"timestep_spacing": "trailing"}),
    "hyper, unified": ("sd15", "TCDScheduler", {}),
    "lcm-lora": ("sd15", "LCMScheduler", {"original_inference_steps": 40}),
}
SAMPLER = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DDIMScheduler": "ddim",
    "TCDScheduler": "tcd",
    "LCMScheduler": "lcm",
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folders_own_scheduler_is_heeded(tmp_path: Path, kind: str):
    """Everything but the sampler's name is left to the folder: 1 to 8 steps side by side, as its pipeline draws."""
    base, scheduler, options = FOLDERS[kind]
    where = scheduled(base, tmp_path / "model", scheduler, **options)
    own = engine(base, where, steps=1, guidance_scale=0.0, sampler=SAMPLER[scheduler])
    counts = (1,) if kind.endswith("1 step") else (1, 2, 4, 8)
    asked = [ask(base, steps=steps, seed=steps, guidance_scale=scale) for steps in counts for scale in (0.0, 1.0)]
    pictures, progress = told(own, asked)
    assert one_row_each(progress)
    assert len({event.forward for event in progress}) == max(counts)
    for request, picture in zip(asked, pictures, strict=True):
        assert_same(picture, theirs(by_diffusers(where), request), f"{kind}, {request.steps} steps")
    [[default]] = own.generate([ask(base)])
    assert (default.seed, own.card.schedule) == (1, "default")
    assert_same(drawn(default.data), pictures[0], "its defaults")


def test_a_lora_and_its_sampler_take_one_row():
    """LCM-LoRA's way: the base model, a LoRA by name, `lcm` and no guidance."""
    asked = [
        ask("sd15", sampler="lcm", schedule="default", steps=4, guidance_scale=1.0, seed=seed, adapters=uses)
        for seed, uses in enumerate(((AdapterUse(name="crescent"),), (AdapterUse(name="crescent", weight=0.5),), ()))
    ]
    pictures, progress = told(engine("sd15", Path(folder("sd15"))), asked)
    assert one_row_each(progress)
    assert {event.rows for event in progress} == {3}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("sd15"), dtype=torch.float32)
    pipe.load_lora_weights(LORAS / "crescent.safetensors", adapter_name="crescent")
    for request, picture in zip(asked[:2], pictures, strict=False):
        pipe.set_adapters(["crescent"], [request.adapters[0].weight])
        assert_same(picture, reference("", pipe.components, request), request.adapters)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_trailing_steps_on_a_folder_that_says_otherwise(base: str):
    """Lightning and Hyper-SD as LoRAs: the base's folder, and `sgm_uniform` in place of its spacing."""
    samplers = ("euler", "ddim", "tcd")  # the others in test_parity
    asked = [
        ask(base, sampler=sampler, schedule="sgm_uniform", steps=steps, guidance_scale=0.0, seed=steps)
        for sampler in samplers
        for steps in (1, 4)
    ]
    pictures, progress = told(engine(base, Path(folder(base))), asked)
    assert one_row_each(progress)
    for request, picture in zip(asked, pictures, strict=True):
        expected = reference("", pipeline(base).components, request, height=128, width=128)
        assert_same(picture, expected, f"{request.sampler}, {request.steps} steps")


def test_few_steps_beside_many():
    """One batch of a guided picture of many steps, unguided ones of few, and a composition."""
    asked = [
        ask("sd15", steps=8, guidance_scale=6.0, sampler="dpmpp_2m", negative_prompt="a ring"),
        ask("sd15", steps=1, guidance_scale=0.0, sampler="euler_a", schedule="sgm_uniform"),
        ask("sd15", steps=4, guidance_scale=1.0, sampler="lcm"),
        ask("sd15", steps=2, sampler="tcd", prompt="a red circle AND a star"),
    ]
    own = engine("sd15", Path(folder("sd15")))
    pictures, progress = told(own, asked)
    assert progress[0].rows == 2 + 1 + 1 + 3
    for request, picture in zip(asked, pictures, strict=True):
        assert_same(picture, told(own, [request])[0][0], request.sampler)


def test_a_solver_that_knows_no_clean_pictures_is_refused(tmp_path: Path):
    where = scheduled("sd15", tmp_path / "model", "EulerDiscreteScheduler", prediction_type="sample")
    for sampler in ("euler_a", "dpm2", "pndm"):
        with pytest.raises(InvalidRequest, match="cannot run with this model") as refused:
            engine("sd15", where).submit(ask("sd15", sampler=sampler), lambda event: None)
        assert refused.value.field == "sampler"


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("denoise_strength", {"image": sketch(), "denoise_strength": 0.75}),
        ("denoise_strength", {"image": sketch(), "mask": sketch(), "denoise_strength": 0.9}),
        ("denoise_strength", {"image": sketch(), "denoise_strength": 0.2, "steps": 4}),
        ("hires.denoise_strength", {"hires": Hires(scale=1.5)}),
    ],
)
def test_a_strength_that_leaves_no_step_is_refused(field: str, options: dict[str, object]):
    card = ModelCard.read("sd15", "sd", folder("sd15"), {"steps": 1, "guidance_scale": 0.0, "sampler": "euler_a"})
    with pytest.raises(InvalidRequest, match="no step to take") as refused:
        ask("sd15", **options).resolve(card)
    assert refused.value.field == field


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 49, 98])
def test_a_strength_that_nobody_said_takes_a_step(steps: int):
    card = ModelCard.read("sd15", "sd", folder("sd15"), {"guidance_scale": 0.0, "sampler": "euler_a"})
    strength = ask("sd15", image=sketch(), steps=steps).resolve(card).denoise_strength
    assert int(steps * strength) >= 1
    assert strength == (1.0 if steps == 1 else 0.75)
