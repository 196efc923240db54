"""Attention: what diffusers' own processor computes, and a prompt's keys and values once for as long as it may be."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from models.attention import KeysAndValues, Remembering, remember
from models.conditioning import stack
from models.family import Conditioning
from models.request import GenerationRequest
from tests.models.conftest import loaded_family, new_engine

ROWS, TOKENS, POSITIONS, WIDTH = 3, 7, 16, 32


def layers(name: str) -> list[Attention]:
    return [layer for layer in loaded_family(name).networks["unet"].modules() if isinstance(layer, Attention)]


def layer(told: int | None) -> Attention:
    torch.manual_seed(0)
    made = Attention(query_dim=WIDTH, cross_attention_dim=told, heads=4, dim_head=8)
    remember(made)
    return made.eval()


@contextmanager
def projections(name: str) -> Iterator[Counter[str]]:
    """How often the keys of pictures and those of prompts are made meanwhile, by any one layer."""
    counted: Counter[str] = Counter()
    first = {each.is_cross_attention: each for each in reversed(layers(name))}

    def counting(what: str):
        return lambda *_: counted.update([what])

    handles = [
        first[True].to_k.register_forward_hook(counting("prompts")),
        first[False].to_k.register_forward_hook(counting("pictures")),
    ]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_every_attention_layer_of_a_unet_remembers(name: str):
    assert {type(each.processor) for each in layers(name)} == {Remembering}


@pytest.mark.parametrize("told", [None, 24])
@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_the_arithmetic_is_that_of_diffusers(told: int | None, masked: bool):
    ours, hidden = layer(told), torch.randn(ROWS, POSITIONS, WIDTH)
    context = None if told is None else torch.randn(ROWS, TOKENS, told)
    mask = None
    if masked:
        mask = torch.zeros(ROWS, 1, TOKENS if told else POSITIONS)
        mask[1, :, 4:] = -10000.0
    remembered = KeysAndValues()
    first = ours(hidden, context, attention_mask=mask, remembered=remembered)
    again = ours(hidden, context, attention_mask=mask, remembered=remembered)
    plain = ours(hidden, context, attention_mask=mask)
    ours.set_processor(AttnProcessor2_0())
    theirs = ours(hidden, context, attention_mask=mask)
    assert torch.equal(first, again)
    assert torch.equal(first, plain)
    assert torch.allclose(first, theirs, atol=1e-6)
    assert len(remembered) == (told is not None)


@torch.inference_mode()
def test_what_would_take_too_much_memory_is_made_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("models.attention.BYTES", 2 * ROWS * TOKENS * WIDTH * 4)  # of one layer, keys and values
    remembered, hidden, context = KeysAndValues(), torch.randn(ROWS, POSITIONS, WIDTH), torch.randn(ROWS, TOKENS, 24)
    for _ in range(2):
        for one in (layer(24), layer(24)):
            assert torch.equal(one(hidden, context, remembered=remembered), one(hidden, context))
    assert len(remembered) == 1


@torch.inference_mode()
def test_parts_of_the_rows_remember_for_themselves():
    family, told = loaded_family("sd15"), torch.randn(4, 77, 128)
    rows = stack([Conditioning(context=each) for each in told])
    latents, timesteps = torch.randn(4, 4, 16, 16), torch.full((4,), 500.0)
    whole = family.predict(latents, timesteps, rows)
    for _ in range(2):
        for part in (slice(0, 2), slice(2, 4)):
            mine = family.predict(latents[part], timesteps[part], rows.part(part))
            assert torch.allclose(mine, whole[part], atol=1e-4)


def test_an_engine_at_rest_remembers_nothing():
    engine = new_engine("sd15")
    engine.generate([request("a red circle", 3), request("a blue ring", 3)])
    assert engine._denoiser._batch is None


def test_a_layer_that_does_more_keeps_its_processor():
    normed = Attention(query_dim=WIDTH, heads=4, dim_head=8, residual_connection=True)
    remember(normed)
    assert type(normed.processor) is AttnProcessor2_0


def request(prompt: str, steps: int, **options) -> GenerationRequest:
    return GenerationRequest(model="sd15", prompt=prompt, sampler="euler", steps=steps, seed=1, **options)


@pytest.mark.parametrize(
    ("requests", "made"),
    [
        ([request("a red circle", 6)], 1),
        ([request("a [red:blue:0.5] circle", 6)], 2),
        ([request("a red circle", 6), request("a blue ring", 3)], 2),
    ],
    ids=["one", "a prompt that changes", "a neighbour that leaves"],
)
def test_keys_of_prompts_are_made_when_somebody_comes_or_goes_or_is_told_something_else(
    requests: list[GenerationRequest], made: int
):
    engine = new_engine("sd15")
    with projections("sd15") as counted:
        engine.generate(requests)
    assert counted == {"prompts": made, "pictures": 6}
