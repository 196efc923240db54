"""What prompts say is seen in the pictures: changes, compositions, emphasis and long prompts, in mixed batches."""

import functools

import diffusers
import numpy as np
import pytest
import torch

from models.errors import InvalidRequest
from models.request import GenerationRequest
from models.samplers import SAMPLERS, SCHEDULES
from tests.models.conftest import drawn, new_engine, pipeline

FILLER = ", " * 150


def ask(prompt: str, **fields) -> GenerationRequest:
    fields = {"model": "sd15", "steps": 6, "seed": 5, "sampler": "euler", "schedule": "default"} | fields
    return GenerationRequest(prompt=prompt, **({"guidance_scale": 5.0} | fields))


@functools.cache
def picture(request: GenerationRequest) -> np.ndarray:
    [[finished]] = new_engine(request.model).generate([request])
    return drawn(finished.data)


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return np.abs(one - other).max()


def test_a_change_at_the_start_or_the_end_is_the_other_prompt():
    red, green = (picture(ask(f"a {colour} circle on a blue background")) for colour in ("red", "green"))
    assert apart(red, green) > 50
    assert apart(picture(ask("a [red:green:0.0] circle on a blue background")), green) <= 1
    assert apart(picture(ask("a [red:green:1.0] circle on a blue background")), red) <= 1
    between = picture(ask("a [red:green:0.5] circle on a blue background"))
    assert min(apart(between, red), apart(between, green)) > 5


@pytest.mark.parametrize("sampler", ["euler", "heun", "pndm"])
def test_the_conditioning_changes_at_its_step_whatever_a_step_costs(sampler):
    """diffusers' own scheduler, told by hand when to change: after 2 of 6 steps."""
    changing = ask("a [red:green:2] circle", sampler=sampler, steps=6, negative_prompt="[ring|star]")
    texts = {"heun": "001122334455"[:-1], "pndm": "0012345"}.get(sampler, "012345")
    said = [("ring" if int(n) % 2 == 0 else "star", f"a {'red' if int(n) < 2 else 'green'} circle") for n in texts]
    expected = by_hand(changing, lambda out: out[0] + 5.0 * (out[1] - out[0]), said)
    assert apart(picture(changing), expected) <= 1


def test_a_composition_is_the_sum_of_its_parts():
    composed = ask("a red circle on the left :0.8 AND a blue square on the right :1.1 AND a ring :-0.2")
    said = [("", "a red circle on the left", "a blue square on the right", "a ring")] * composed.steps

    def guide(out: torch.Tensor) -> torch.Tensor:
        pulls = 0.8 * (out[1] - out[0]) + 1.1 * (out[2] - out[0]) - 0.2 * (out[3] - out[0])
        return out[0] + 5.0 * pulls

    assert apart(picture(composed), by_hand(composed, guide, said)) <= 1


def test_a_composition_without_guidance_still_has_its_unconditional_row():
    composed = ask("a red circle AND a blue square :0.5", guidance_scale=1.0)
    said = [("", "a red circle", "a blue square")] * composed.steps
    expected = by_hand(composed, lambda out: out[1] + 0.5 * (out[2] - out[0]), said)
    assert apart(picture(composed), expected) <= 1


def test_words_beyond_the_first_chunks_of_a_200_token_prompt_are_drawn():
    red, green = (picture(ask(FILLER + f", a {c} circle on a white background " * 6)) for c in ("red", "green"))
    assert red[64, 64, 0] > 150 > 100 > red[64, 64, 1]
    assert green[64, 64, 1] > 110 > 100 > green[64, 64, 0]


def test_more_weight_pulls_further():
    pictures = [picture(ask(f"a (red:{weight}) circle on a blue background")) for weight in (1.0, 1.5, 4.0)]
    some, more = (np.abs(heavy - pictures[0]).mean() for heavy in pictures[1:])
    assert 0 < some < more


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_rows_of_all_kinds_share_a_batch_and_each_gets_the_picture_it_gets_alone(model):
    requests = [
        ask("a red circle", model=model),
        ask("a (red:1.3) [circle|square] on a [blue:green:0.4] background", model=model, guidance_rescale=0.5),
        ask("a red circle AND a blue square :0.7", model=model, steps=4, sampler="heun"),
        ask(f"{FILLER} a green star", model=model, negative_prompt="a ring BREAK [a cross::3]"),
        ask("a blue star", model=model, guidance_scale=1.0),
    ]
    engine = new_engine(model)
    together = engine.generate(requests)
    for request, [finished] in zip(requests, together, strict=True):
        assert apart(drawn(finished.data), picture(request)) <= 1, request.prompt
    assert engine.load().forwards <= 8


def test_a_prompt_that_cannot_be_read_is_refused_when_it_is_submitted():
    engine = new_engine("sd15")
    for fields, field in (({"prompt": "(a:99)"}, "prompt"), ({"negative_prompt": "a AND b"}, "negative_prompt")):
        with pytest.raises(InvalidRequest) as refused:
            engine.submit(ask(**({"prompt": "a red circle"} | fields)), lambda event: None)
        assert refused.value.field == field
    assert engine.load().waiting == 0
    [[plain]] = engine.generate([ask("(a:99) AND [b", prompt_syntax="plain")])
    assert plain.data


def by_hand(request: GenerationRequest, guide, said: list[tuple[str, ...]]) -> np.ndarray:
    """A picture by diffusers' networks and scheduler, told `said[i]` at the i-th forward, rows combined by `guide`."""
    pipe = pipeline(request.model)
    named = SAMPLERS[request.sampler]
    options = dict(pipe.scheduler.config) | dict(named.options) | dict(SCHEDULES[request.schedule])
    scheduler = getattr(diffusers, named.scheduler).from_config(options)
    scheduler.set_timesteps(request.steps)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(request.seed))
    latents = latents * scheduler.init_noise_sigma
    for timestep, texts in zip(scheduler.timesteps, said, strict=True):
        with torch.no_grad():
            contexts = torch.cat([encoded(request.model, text) for text in texts])
            inputs = scheduler.scale_model_input(latents, timestep).expand(len(texts), -1, -1, -1)
            outputs = pipe.unet(inputs, timestep, contexts).sample
        latents = scheduler.step(guide(outputs)[None], timestep, latents, return_dict=False)[0]
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return ((decoded[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(int)


@functools.cache
def encoded(model: str, text: str) -> torch.Tensor:
    pipe = pipeline(model)
    embeddings, _ = pipe.encode_prompt(text, "cpu", 1, False)
    return embeddings
