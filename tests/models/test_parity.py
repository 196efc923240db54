"""Acceptance 2: for every sampler, model and task the engine draws what diffusers' own pipeline draws."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from models.request import GenerationRequest
from models.samplers import SAMPLERS
from tests.models.conftest import drawn, new_engine, pipeline, reference, sketch

MODELS = ("sd15", "sd21", "sdxl")
STEPS = 6


@dataclass
class Case:
    request: GenerationRequest
    picture: np.ndarray | None = None


def cases(model: str) -> list[Case]:
    """Every sampler, from noise and from a picture; guidance, prompts and seeds all different."""
    made = []
    for number, sampler in enumerate(SAMPLERS):
        for image in (None, sketch()):
            request = GenerationRequest(
                model=model,
                prompt=f"a red circle on a blue background, {sampler}",
                negative_prompt="" if number % 2 else "a ring",
                sampler=sampler,
                schedule="default",
                steps=STEPS,
                seed=number,
                guidance_scale=1.0 if sampler == "lcm" else 4.0 + number / 4,
                guidance_rescale=0.5 if sampler == "ddpm" and image is None else 0.0,
                clip_skip=1 if sampler == "euler" and model == "sdxl" else 0,  # diffusers' own SD pipelines fail at it
                image=image,
                denoise_strength=None if image is None else 0.7,
            )
            made.append(Case(request))
    return made


def by_diffusers(request: GenerationRequest) -> np.ndarray:
    parts, clip_skip = pipeline(request.model).components, request.clip_skip or None
    if request.image is None:
        options = {"height": 128, "width": 128, "guidance_rescale": request.guidance_rescale}
        return reference("", parts, request, clip_skip=clip_skip, **options)
    options = {"image": Image.fromarray(request.image.array()), "strength": request.denoise_strength}
    return reference("Img2Img", parts, request, clip_skip=clip_skip, **options)


@pytest.fixture(scope="module")
def pictures() -> dict[str, dict[tuple[str, str], Case]]:
    """All cases of each model, drawn together in one mixed batch."""
    made = {}
    for model in MODELS:
        model_cases = cases(model)
        results = new_engine(model).generate([case.request for case in model_cases])
        for case, result in zip(model_cases, results, strict=True):
            case.picture = drawn(result[0].data)
        made[model] = {(c.request.sampler, "img2img" if c.request.image else "txt2img"): c for c in model_cases}
    return made


@pytest.mark.parametrize("task", ["txt2img", "img2img"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", MODELS)
def test_every_sampler_draws_what_diffusers_draws(pictures, model, sampler, task):
    case = pictures[model][sampler, task]
    difference = np.abs(case.picture - by_diffusers(case.request)).max()
    assert difference <= 1, f"{difference}/255 away from diffusers"


@pytest.mark.parametrize(
    ("sampler", "schedule"), [(s, n) for s, named in SAMPLERS.items() for n in named.schedules if n == "karras"]
)
def test_karras_schedules_draw_what_diffusers_draws(sampler, schedule):
    request = GenerationRequest(
        model="sd15", prompt="a green star", sampler=sampler, schedule=schedule, steps=4, seed=3, guidance_scale=5.0
    )
    [[finished]] = new_engine("sd15").generate([request])
    assert np.abs(drawn(finished.data) - by_diffusers(request)).max() <= 1


def test_denoise_strength_zero_gives_the_picture_back_through_the_autoencoder():
    request = GenerationRequest(model="sd15", prompt="anything", image=sketch(), denoise_strength=0.0, seed=1)
    [[finished]] = new_engine("sd15").generate([request])
    vae = pipeline("sd15").vae
    pixels = torch.from_numpy(sketch().array().copy()).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
        back = (vae.decode(latents).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    assert np.abs(drawn(finished.data) - (back * 255).round()).max() <= 1


def test_samples_are_the_pictures_of_the_following_seeds():
    engine = new_engine("sd15")
    ask = {"model": "sd15", "prompt": "a blue square", "sampler": "euler_a", "steps": 4}
    [three] = engine.generate([GenerationRequest(**ask, seed=7, samples=3)])
    singles = [engine.generate([GenerationRequest(**ask, seed=seed)])[0][0] for seed in (7, 8, 9)]
    assert [finished.seed for finished in three] == [7, 8, 9]
    for together, alone in zip(three, singles, strict=True):
        assert np.abs(drawn(together.data) - drawn(alone.data)).max() <= 1
