"""More than one run of a tape, and less: hires-fix, variations of the noise, early ends."""

import functools
import io
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import InvalidRequest
from models.events import Failed, Finished, Progress
from models.parts import Hires
from models.request import GenerationRequest
from tests.models.conftest import drawn, new_engine, pipeline, sketch
from tests.models.test_engine import step_until


def ask(**fields) -> GenerationRequest:
    fields = {"model": "sd15", "prompt": "a red circle on a blue background", "steps": 5, "seed": 3} | fields
    return GenerationRequest(**{"sampler": "euler_a"} | fields)


def said(data: bytes) -> dict[str, Any]:
    """What a picture says of itself."""
    return dict(Image.open(io.BytesIO(data)).info)


@functools.cache
def picture(request: GenerationRequest) -> np.ndarray:
    [[finished]] = new_engine(request.model).generate([request])
    return drawn(finished.data)


def twice_by_diffusers(request: GenerationRequest, hires: Hires) -> np.ndarray:
    """txt2img, enlargement and img2img by diffusers' pipelines, one generator going through both."""
    xl = request.model == "sdxl"
    shared = pipeline(request.model)
    parts = shared.components | ({} if xl else {"requires_safety_checker": False})
    parts["scheduler"] = diffusers.EulerAncestralDiscreteScheduler.from_config(shared.scheduler.config)
    first = type(shared)(**parts)
    second = (diffusers.StableDiffusionXLImg2ImgPipeline if xl else diffusers.StableDiffusionImg2ImgPipeline)(**parts)
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(request.seed)
    options = {"prompt": request.prompt, "guidance_scale": 7.5, "generator": generator}
    output = "latent" if hires.upscaler == "latent" else "pil"
    small = first(num_inference_steps=request.steps, output_type=output, width=128, height=128, **options).images
    if hires.upscaler == "latent":
        large = torch.nn.functional.interpolate(small, scale_factor=hires.scale, mode="bilinear")
    else:
        side = int(128 * hires.scale)
        large = small[0].resize((side, side), Image.Resampling.LANCZOS)
    options |= {"image": large, "strength": hires.denoise_strength}
    return np.asarray(second(num_inference_steps=hires.steps, **options).images[0]).astype(int)


@pytest.mark.parametrize(("model", "upscaler"), [("sd15", "latent"), ("sd15", "lanczos"), ("sdxl", "lanczos")])
def test_hires_fix_is_what_two_of_diffusers_pipelines_draw_one_after_the_other(model, upscaler):
    hires = Hires(scale=1.5, steps=4, denoise_strength=0.6, upscaler=upscaler)
    request = ask(model=model, hires=hires, guidance_scale=7.5)
    ours = picture(request)
    assert ours.shape == (192, 192, 3)
    assert np.abs(ours - twice_by_diffusers(request, hires)).max() <= 1


def test_both_phases_count_as_progress_and_neighbours_join_in_either():
    engine, events, other = new_engine("sd15"), [], []
    hires = Hires(scale=1.5, steps=4, denoise_strength=0.5)
    engine.submit(ask(hires=hires, sampler="euler"), events.append)
    engine.submit(ask(width=192, height=192, sampler="euler", steps=20), other.append)
    step_until(engine, lambda: events and isinstance(events[-1], Finished))
    steps = [(p.step, p.steps) for p in events if isinstance(p, Progress)]
    assert steps == [(n, 7) for n in range(1, 8)]  # 5, and half of 4
    assert {p.rows for p in events if isinstance(p, Progress) and p.step > 5} == {4}
    assert not any(isinstance(event, Failed) for event in other)


def test_a_variation_lies_between_two_seeds():
    plain = {"sampler": "dpmpp_2m"}
    base, other = picture(ask(**plain)), picture(ask(seed=9, **plain))
    assert np.abs(picture(ask(variation_strength=0.0, **plain)) - base).max() == 0
    assert np.abs(picture(ask(variation_seed=9, variation_strength=1.0, **plain)) - other).max() <= 1
    between = picture(ask(variation_seed=9, variation_strength=0.2, **plain))
    assert 0 < np.abs(between - base).mean() < np.abs(between - other).mean()


def test_samples_of_a_variation_keep_the_seed_and_count_the_variation_seed():
    request = ask(variation_seed=9, variation_strength=0.3, samples=2)
    [[first, second]] = new_engine("sd15").generate([request])
    assert (first.seed, second.seed) == (3, 3)
    single = picture(ask(variation_seed=10, variation_strength=0.3))
    assert np.abs(drawn(second.data) - single).max() <= 1


def test_a_picture_is_varied_without_a_prompt():
    varied = picture(ask(prompt="", image=sketch(), denoise_strength=0.3, guidance_scale=1.0, sampler="dpmpp_2m"))
    assert 0 < np.abs(varied - sketch().array()).mean() < 40
    with pytest.raises(InvalidRequest, match="input picture"):
        picture(ask(prompt=" "))


def test_a_stop_ends_with_the_estimate_of_that_step():
    engine, events = new_engine("sd15"), []
    engine.submit(ask(steps=20, stop_at_step=8, sampler="dpmpp_2m"), events.append)
    step_until(engine, lambda: events and isinstance(events[-1], Finished))
    assert [(p.step, p.steps) for p in events if isinstance(p, Progress)] == [(n, 8) for n in range(1, 9)]
    whole = picture(ask(steps=20, sampler="dpmpp_2m"))
    stopped, early = drawn(events[-1].data), picture(ask(steps=20, stop_at_step=2, sampler="dpmpp_2m"))
    assert np.abs(stopped - whole).mean() < np.abs(early - whole).mean()
    assert stopped[64, 64, 0] > 150 > stopped[64, 64, 2], "the circle is red already"
    last = picture(ask(steps=20, stop_at_step=20, sampler="dpmpp_2m"))
    assert np.abs(last - whole).max() <= 1


@pytest.mark.parametrize(
    ("fields", "forwards"),
    [
        ({"steps": 20}, 20),
        ({"steps": 4, "sampler": "heun"}, 7),
        ({"steps": 5, "hires": Hires(steps=4, denoise_strength=0.5)}, 7),
        ({"steps": 4, "image": sketch(), "denoise_strength": 0.5}, 2),
    ],
)
def test_a_stop_behind_the_end_is_refused_and_told_where_the_end_is(fields, forwards):
    with pytest.raises(InvalidRequest, match=f"must be at most {forwards},.* not {forwards + 1}$") as refused:
        new_engine("sd15").submit(ask(stop_at_step=forwards + 1, **fields), lambda event: None)
    assert refused.value.field == "stop_at_step"
    new_engine("sd15").submit(ask(stop_at_step=forwards, **fields), lambda event: None)


def test_an_accepted_preview_is_the_picture():
    engine, events = new_engine("sd15"), []
    ticket = engine.submit(ask(steps=50, sampler="dpmpp_2m"), events.append)
    for _ in range(20):
        engine.step()
    engine.accept(ticket)
    step_until(engine, lambda: events and isinstance(events[-1], Finished))
    steps = [p.step for p in events if isinstance(p, Progress)]
    assert steps[-1] == 20, "no step follows"
    assert events[-1].stop_at_step == 20
    assert drawn(events[-1].data)[64, 64, 0] > 150, "the circle is red already"
    assert engine.load().running == 0


def test_a_picture_says_where_it_was_ended_and_is_what_a_stop_there_draws():
    """Of two pictures, one before its first step; one whole; told without any progress."""
    engine, events, others = new_engine("sd15"), [], []
    early = ask(steps=6, samples=2, metadata="full")
    ticket = engine.submit(early, events.append, progress=False)
    engine.submit(ask(), others.append, progress=False)
    engine.accept(ticket)
    step_until(engine, lambda: len(events) == 2 and others)
    assert {event.stop_at_step for event in events} == {1}
    [stopped] = new_engine("sd15").generate([replace(early, stop_at_step=1)])
    for event, finished in zip(sorted(events, key=lambda event: event.index), stopped, strict=True):
        assert np.abs(drawn(event.data) - drawn(finished.data)).max() <= 1  # in other company
        assert said(event.data) == said(finished.data), "what it says of itself too"
    assert {finished.stop_at_step for finished in stopped} == {None}, "that is what was asked for"
    assert others[0].stop_at_step is None
