"""Prompts are encoded once, together, and as each family means it."""

import pytest
import torch

from models.card import ModelCard
from models.conditioning import Conditioner, stack
from models.errors import InvalidRequest
from models.family import takes_mask
from models.request import EffectiveRequest, GenerationRequest
from tests.models.conftest import FAMILIES, folder, loaded_family, pipeline


class Counting:
    """A real family that counts how often its encoders run."""

    def __init__(self, name: str):
        self._family = loaded_family(name)
        self.calls: list[list[str]] = []

    def __getattr__(self, name):
        return getattr(self._family, name)

    def embed(self, prompts, clip_skip):
        self.calls.append(list(prompts))
        return self._family.embed(prompts, clip_skip)


def ask(model: str = "sd15", **fields) -> EffectiveRequest:
    request = GenerationRequest(**({"model": model, "prompt": "a red circle"} | fields))
    return request.resolve(ModelCard.read(model, FAMILIES[model], folder(model)))


def test_a_prompt_is_encoded_once_and_new_ones_together():
    family = Counting("sd15")
    conditioner = Conditioner(family)
    conditioner.encode([ask(), ask(), ask(prompt="a blue square")])
    conditioner.encode([ask(negative_prompt="a blue square")])
    assert family.calls == [["a red circle", "", "a blue square"]]


def test_the_least_recently_used_prompt_is_forgotten_first():
    family = Counting("sd15")
    conditioner = Conditioner(family, capacity=2)
    for prompt in ("one", "two", "one", "three", "one", "two"):
        conditioner.encode([ask(prompt=prompt, guidance_scale=1.0)])
    assert family.calls == [["one"], ["two"], ["three"], ["two"]]


def test_an_unguided_request_has_one_row():
    [(guided, _), (plain, _)] = Conditioner(loaded_family("sd15")).encode([ask(), ask(guidance_scale=1.0)])
    assert (len(guided), len(plain)) == (2, 1)
    assert torch.equal(guided[1].context, plain[0].context)


def test_an_empty_negative_prompt_means_zeros_where_the_model_says_so():
    [(rows, _)] = Conditioner(loaded_family("sdxl")).encode([ask("sdxl")])
    zeroed = bool(pipeline("sdxl").config.force_zeros_for_empty_prompt)
    assert (not rows[0].context.any()) == zeroed
    assert (not rows[0].added["text_embeds"].any()) == zeroed
    assert rows[0].added["time_ids"].tolist() == [128, 128, 0, 0, 128, 128]


def test_rows_of_a_batch_have_one_leading_axis():
    encoded = Conditioner(loaded_family("sdxl")).encode([ask("sdxl"), ask("sdxl", prompt="x", width=256)])
    rows = stack([row for rows, _ in encoded for row in rows])
    assert rows.context.shape[:2] == (4, 77)
    assert rows.added["time_ids"].shape == (4, 6)


def test_a_network_for_inpainting_is_known_and_one_that_wants_other_inputs_is_refused():
    config, kind = dict(pipeline("sd15").unet.config), type(pipeline("sd15").unet)
    with torch.device("meta"):
        assert takes_mask(kind.from_config(config | {"in_channels": 9}), 4)
        depth = kind.from_config(config | {"in_channels": 5})
        distilled = kind.from_config(config | {"time_cond_proj_dim": 64})
    for unet in (depth, distilled):
        with pytest.raises(InvalidRequest, match="source"):
            takes_mask(unet, 4)


def test_clip_skip_takes_an_earlier_layer_through_the_final_norm():
    """What diffusers' pipeline means to do; with this transformers its own attribute access fails."""
    encoder, tokenizer = pipeline("sd15").text_encoder, pipeline("sd15").tokenizer
    ids = tokenizer("a red circle", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        layers = encoder(ids, output_hidden_states=True).hidden_states
        expected = encoder.final_layer_norm(layers[-2])[0]
    [skipped] = loaded_family("sd15").embed(["a red circle"], 1)
    [plain] = loaded_family("sd15").embed(["a red circle"], 0)
    assert torch.allclose(skipped.context, expected, atol=1e-5)
    assert not torch.allclose(skipped.context, plain.context, atol=1e-2)
