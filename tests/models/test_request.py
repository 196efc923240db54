"""Requests: defaults resolved once, ranges held, names people use understood."""

import dataclasses

import pytest

from models.card import ModelCard
from models.errors import InvalidRequest
from models.images import Picture
from models.request import EffectiveRequest, GenerationRequest
from models.samplers import SAMPLERS, find_sampler, find_schedule

CARD = ModelCard(name="m", family="sd", width=512, height=512, max_pixels=1024 * 1024)


WHITE = Picture(width=64, height=64, data=bytes([255]) * (64 * 64 * 3))


def resolve(**fields) -> EffectiveRequest:
    return GenerationRequest(**({"model": "m", "prompt": "a fox"} | fields)).resolve(CARD)


def test_what_is_not_said_comes_from_the_card():
    request = resolve()
    assert (request.width, request.height, request.steps, request.guidance_scale) == (512, 512, 25, 7.5)
    assert (request.sampler, request.schedule) == ("dpmpp_2m", "karras")
    assert 0 <= request.seed < 2**32
    assert resolve().seed != request.seed


def test_resolving_again_changes_nothing():
    request = resolve(steps=7)
    assert request.resolve(CARD) == request


def test_a_request_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("k_euler_a", ("euler_a", None)),
        ("Euler a", ("euler_a", None)),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("PLMS", ("pndm", None)),
        ("UniPC", ("unipc", None)),
        ("k_dpm_2_ancestral", ("dpm2_a", None)),
        ("DPM2 a Karras", ("dpm2_a", "karras")),
        ("LMS Karras", ("lms", "karras")),
    ],
)
def test_sampler_names_people_use_elsewhere(name, expected):
    assert find_sampler(name) == expected


def test_every_alias_belongs_to_one_sampler():
    for name, sampler in SAMPLERS.items():
        for alias in (name, *sampler.aliases):
            assert find_sampler(alias) == (name, None)


def test_a_sampler_named_alone_does_not_take_over_the_models_schedule():
    assert (resolve(sampler="ddim").sampler, resolve(sampler="ddim").schedule) == ("ddim", "default")
    assert resolve(sampler="dpmpp_2m").schedule == "karras"
    assert resolve(sampler="Euler Karras").schedule == "karras"
    assert find_schedule("Trailing") == "sgm_uniform"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 10_001}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"negative_prompt": "\ud800"}, "negative_prompt"),
        ({"width": 513}, "width"),
        ({"height": 8}, "height"),
        ({"width": 2048, "height": 1024}, "width"),
        ({"steps": 0}, "steps"),
        ({"steps": 1_000_000}, "steps"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_rescale": 1.5}, "guidance_rescale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"samples": 0}, "samples"),
        ({"samples": 17}, "samples"),
        ({"clip_skip": 9}, "clip_skip"),
        ({"deep_cache": 0}, "deep_cache"),
        ({"deep_cache": 11}, "deep_cache"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"denoise_strength": 0.5}, "denoise_strength"),
        ({"output_format": "gif"}, "output_format"),
        ({"priority": "urgent"}, "priority"),
        ({"sampler": "nope"}, "sampler"),
        ({"schedule": "nope"}, "schedule"),
        ({"sampler": "euler_a", "schedule": "karras"}, "schedule"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(fields, field):
    with pytest.raises(InvalidRequest) as refused:
        resolve(**fields)
    assert refused.value.field == field


def test_an_input_picture_lends_its_size_and_its_default_strength():
    picture = Picture(width=203, height=130, data=bytes(203 * 130 * 3))
    request = resolve(image=picture)
    assert (request.width, request.height, request.denoise_strength, request.task) == (200, 128, 0.75, "img2img")
    assert resolve(image=picture, width=256).width == 256


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"mask_blur": 8}, "mask_blur"),
        ({"paste_back": False}, "paste_back"),
        ({"mask_region": "masked"}, "mask_region"),
        ({"variation_seed": 5}, "variation_seed"),
        ({"denoise_strength": 0.5}, "denoise_strength"),
        ({"mask": WHITE}, "mask"),
        ({"mask_fill": "fill"}, "mask_fill"),
        ({"image": WHITE, "mask": WHITE, "mask_padding": 8}, "mask_padding"),
        ({"image": WHITE, "mask": WHITE, "mask_fill": "noise", "denoise_strength": 1.0}, "mask_fill"),
        ({"guidance_scale": 1.0, "guidance_rescale": 0.5}, "guidance_rescale"),
    ],
)
def test_a_field_that_says_nothing_alone_is_refused_and_not_ignored(fields, field):
    with pytest.raises(InvalidRequest, match="needs") as refused:
        resolve(**fields)
    assert refused.value.field == field


def test_what_says_something_in_company_is_taken():
    region = {"mask_region": "masked", "mask_padding": 8, "width": 64, "height": 64}
    assert resolve(image=WHITE, mask=WHITE, **region).mask_padding == 8
    assert resolve(guidance_scale=1.0, guidance_rescale=0.5, prompt="a fox AND a hare").guidance_rescale == 0.5


def test_a_filled_mask_is_not_drawn_from_noise_alone_unless_asked_for():
    assert resolve(image=WHITE, mask=WHITE).denoise_strength == 1.0
    assert resolve(image=WHITE, mask=WHITE, mask_fill="fill").denoise_strength == 0.75


def test_tags_of_loras_are_moved_out_of_the_prompt():
    request = resolve(prompt="a red circle <lora:moon:0.5>")
    assert "<lora" not in request.prompt
    assert [(use.name, use.weight) for use in request.adapters] == [("moon", 0.5)]
    assert resolve(prompt="a <lora:moon:0.5>", prompt_syntax="plain").prompt == "a <lora:moon:0.5>"
