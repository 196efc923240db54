"""Prompts are encoded once, together, and as each family means it; rows change when their prompts say so."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import save

from models.adapters.lora import Lora
from models.adapters.textual_inversion import TextualInversion
from models.card import ModelCard
from models.conditioning import Conditioner, Encoded, Row, stack
from models.encoders import emphasized
from models.errors import InvalidRequest
from models.family import Conditioning, takes_mask
from models.request import EffectiveRequest, GenerationRequest
from models.script import Run
from models.tokens import CHUNKS, Chunk, Wording
from tests.models.conftest import FAMILIES, bare, folder, loaded_family, pipeline

LONG = "a large red circle on the left of a small blue square , " * 12  # 156 tokens, 3 chunks


class Counting:
    """A real family that counts how often its encoders run."""

    def __init__(self, name: str):
        self._family = loaded_family(name)
        self.calls: list[list[str]] = []

    def __getattr__(self, name):
        return getattr(self._family, name)

    def embed(self, wordings, encoding):
        self.calls.append([said(wording) for wording in wordings])
        return self._family.embed(wordings, encoding)


def said(wording: Wording) -> str:
    return "".join(span.text for section in wording.text for span in section)


def ask(model: str = "sd15", **fields) -> EffectiveRequest:
    request = GenerationRequest(**({"model": model, "prompt": "a red circle"} | fields))
    return request.resolve(ModelCard.read(model, FAMILIES[model], folder(model)))


def encode(conditioner: Conditioner, *requests: EffectiveRequest) -> list[Encoded]:
    return conditioner.encode([conditioner.script(request) for request in requests])


def rows(model: str = "sd15", **fields) -> list[Row]:
    [encoded] = encode(Conditioner(loaded_family(model)), ask(model, **fields))
    return encoded.rows


def context(prompt: str, model: str = "sd15", **fields) -> torch.Tensor:
    return rows(model, prompt=prompt, guidance_scale=1.0, **fields)[0].at(0).context


def test_a_prompt_is_encoded_once_and_new_ones_together():
    family = Counting("sd15")
    conditioner = Conditioner(family)
    encode(conditioner, ask(), ask(), ask(prompt="a blue square"))
    encode(conditioner, ask(negative_prompt="a blue square"), ask(prompt="a [red|red] circle"))
    assert family.calls == [["", "a red circle", "a blue square"]]
    encode(conditioner, ask(prompt="a (red:1.2) circle"), ask(clip_skip=1))
    assert family.calls[1:] == [["a red circle", "a red circle"]]


def test_the_least_recently_used_prompt_is_forgotten_first():
    family = Counting("sd15")
    conditioner = Conditioner(family, capacity=2)
    for prompt in ("one", "two", "one", "three", "one", "two"):
        encode(conditioner, ask(prompt=prompt, guidance_scale=1.0))
    assert family.calls == [["one"], ["two"], ["three"], ["two"]]


def test_a_text_is_remembered_by_what_its_adapters_hold_and_none_of_them_is_kept():
    family, known = Counting("sd15"), {}
    conditioner = Conditioner(family, known)

    def told(word: float, sha256: str, weight: float) -> list[weakref.ref]:
        known["quux"] = TextualInversion.read("quux", save({"emb_params": torch.full((1, 128), word)}))
        lora = Lora(name="moon", sha256=sha256, targets={})
        request = ask(prompt="a quux", guidance_scale=1.0)
        conditioner.encode([conditioner.script(request, loras=((lora, weight),))])
        return [weakref.ref(lora), weakref.ref(known.pop("quux"))]

    used = told(0.1, "a" * 64, 0.5)
    gc.collect()
    assert [adapter() for adapter in used] == [None, None]
    told(0.1, "a" * 64, 0.5)  # loaded again: the same content
    assert len(family.calls) == 1
    for others in ((0.2, "a" * 64, 0.5), (0.1, "b" * 64, 0.5), (0.1, "a" * 64, 0.6)):
        told(*others)
    assert len(family.calls) == 4


def test_a_long_prompt_takes_as_much_of_the_memory_as_it_has_chunks():
    family = Counting("sd15")
    conditioner = Conditioner(family, capacity=3)
    for prompt in ("one", LONG, LONG, "one"):
        encode(conditioner, ask(prompt=prompt, guidance_scale=1.0))
    assert family.calls == [["one"], [LONG], ["one"]]


def test_an_unguided_request_has_one_row():
    guided, plain = rows(), rows(guidance_scale=1.0)
    assert (len(guided), len(plain)) == (2, 1)
    assert torch.equal(guided[1].at(0).context, plain[0].at(0).context)


def test_a_composition_has_a_row_for_each_part_and_an_unconditional_one_even_unguided():
    for guidance_scale in (1.0, 5.0):
        composed = rows(prompt="a red circle :0.7 AND a blue square", guidance_scale=guidance_scale)
        assert [row.weight for row in composed] == [1.0, 0.7, 1.0]
        assert torch.equal(composed[0].at(0).context, rows()[0].at(0).context)
        assert torch.allclose(composed[2].at(0).context, context("a blue square"), atol=1e-5)


def test_an_empty_negative_prompt_means_zeros_where_the_model_says_so():
    unconditional = rows("sdxl")[0].at(0)
    zeroed = bool(pipeline("sdxl").config.force_zeros_for_empty_prompt)
    assert (not unconditional.context.any()) == zeroed
    assert (not unconditional.added["text_embeds"].any()) == zeroed
    assert unconditional.added["time_ids"].tolist() == [128, 128, 0, 0, 128, 128]


def test_rows_of_a_batch_have_one_leading_axis():
    both = [row.at(0) for fields in ({}, {"prompt": "x", "width": 256}) for row in rows("sdxl", **fields)]
    stacked = stack(both)
    assert stacked.context.shape[:2] == (4, 77)
    assert stacked.added["time_ids"].shape == (4, 6)
    assert stacked.mask is None


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_a_row_feels_nothing_of_a_longer_one_beside_it(model):
    family = loaded_family(model)
    short, long = rows(model)[1].at(0), rows(model, prompt=LONG)[1].at(0)
    assert (len(short.context), len(long.context)) == (77, 3 * 77)
    both = stack([short, long])
    assert both.mask.sum(1).tolist() == [77, 231]
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([500.0, 500.0])
    together = family.predict(latents, timesteps, both)
    for i, alone in enumerate((short, long)):
        single = family.predict(latents[i : i + 1], timesteps[:1], stack([alone]))
        assert (together[i] - single[0]).abs().max() <= 1e-4


def test_a_row_that_brings_its_own_mask_keeps_it():
    own = Conditioning(context=torch.ones(3, 2), mask=torch.tensor([True, True, False]))
    stacked = stack([own, Conditioning(context=torch.ones(5, 2))])
    assert stacked.mask.tolist() == [[True, True, False, False, False], [True] * 5]
    assert stacked.context[0].sum(1).tolist() == [2, 2, 2, 0, 0]


def test_weights_multiply_and_the_mean_is_put_back():
    plain, heavy = context("a red circle"), context("a (red:1.4) circle")
    expected = plain.clone()
    expected[2] *= 1.4  # after the start and `a`
    expected *= plain.mean() / expected.mean()
    assert torch.allclose(heavy, expected, atol=1e-5)
    assert not torch.allclose(heavy, plain, atol=1e-2)


def test_a_mean_of_nothing_is_not_put_back():
    chunks = [Chunk([0, 0], [1.0, weight], {}, 0) for weight in (2.0, 1.5, 1.0)]
    hidden = torch.tensor([[[1.0], [-0.9]], [[1.0], [0.5]], [[1.0], [0.5]]])
    heavy = emphasized(hidden, chunks).flatten(1)
    assert torch.allclose(heavy, torch.tensor([[1.0, -1.8], [1.5 / 1.75, 1.125 / 1.75], [1.0, 0.5]]))


@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl"])
def test_weights_of_one_change_nothing_at_all(model):
    for same in ("(a red circle:1.0)", "a ([red]) circle", "a [red:blue:1.0] circle"):
        assert torch.equal(context(same, model), context("a red circle", model))


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_chunks_are_encoded_for_themselves_and_stand_side_by_side(model):
    first, second = "a red circle", "a (blue:1.3) square"
    both = context(f"{first} BREAK {second}", model)
    assert torch.allclose(both, torch.cat([context(first, model), context(second, model)]), atol=1e-5)
    if model == "sdxl":
        pooled = [rows(model, prompt=prompt)[1].at(0).added["text_embeds"] for prompt in (f"{first} BREAK x", first)]
        assert torch.allclose(*pooled, atol=1e-5)


def test_rows_change_when_the_prompts_say_so():
    changing = rows(prompt="a [red:blue:0.5] circle", negative_prompt="[x|y]", steps=4)
    alone = {prompt: context(prompt) for prompt in ("a red circle", "a blue circle", "x", "y")}
    for step, (unconditional, prompt) in enumerate(
        (("x", "a red circle"), ("y", "a red circle"), ("x", "a blue circle"), ("y", "a blue circle"))
    ):
        assert torch.allclose(changing[0].at(step).context, alone[unconditional], atol=1e-5)
        assert torch.allclose(changing[1].at(step).context, alone[prompt], atol=1e-5)
    assert changing[1].at(0) is changing[1].at(1)
    assert changing[1].at(2) is changing[1].at(99)


def test_steps_count_on_through_phases_and_sizes_change_with_them():
    conditioner = Conditioner(loaded_family("sdxl"))
    runs = [Run((0, 0, 1, 1, 2), 128, 128), Run((0, 0, 1), 192, 256)]  # three steps, two steps, of two forwards
    script = conditioner.script(ask("sdxl", prompt="[a:b:0.7][:c:4]", guidance_scale=1.0), runs)
    assert [(first, said(wording)) for first, wording in script.lines[0].timeline] == [(0, "a"), (4, "b"), (7, "bc")]
    [encoded] = conditioner.encode([script])
    sizes = [encoded.rows[0].at(forward).added["time_ids"][:2].tolist() for forward in range(8)]
    assert sizes == [[128, 128]] * 5 + [[256, 192]] * 3


def test_an_empty_tape_is_told_the_first_text():
    conditioner = Conditioner(loaded_family("sd15"))
    script = conditioner.script(ask(prompt="[a:b:0.5]", guidance_scale=1.0), [Run((), 128, 128)])
    assert [said(wording) for _, wording in script.lines[0].timeline] == ["a"]


def test_reports_tell_tokens_chunks_and_what_was_left_out():
    conditioner = Conditioner(loaded_family("sd15"))
    told, composed, cut = encode(
        conditioner,
        ask(prompt=LONG, negative_prompt="[blurry|a blurry circle]"),
        ask(prompt="a red circle AND a blue square BREAK x"),
        ask(prompt="red " * 75 * CHUNKS + "Green circle", guidance_scale=1.0),
    )
    assert (told.reports["prompt"].tokens, told.reports["prompt"].chunks) == (156, 3)
    assert (told.reports["negative_prompt"].tokens, told.reports["negative_prompt"].chunks) == (3, 1)
    assert told.warnings == []
    assert (composed.reports["prompt"].tokens, composed.reports["prompt"].chunks) == (7, 3)
    assert cut.reports["prompt"].truncated == "Green circle"
    assert list(cut.reports) == ["prompt"]
    assert cut.warnings == ["prompt is longer than the text encoder takes; left out: 'Green circle'"]


def test_a_network_that_wants_more_inputs_is_refused():
    config = dict(pipeline("sd15").unet.config)
    with torch.device("meta"):
        depth = type(pipeline("sd15").unet).from_config(config | {"in_channels": 5})
    with pytest.raises(InvalidRequest, match="source"):
        takes_mask(depth, 4)


def test_clip_skip_takes_an_earlier_layer_through_the_final_norm():
    """What diffusers' pipeline means to do; with this transformers its own attribute access fails."""
    encoder, tokenizer = pipeline("sd15").text_encoder, pipeline("sd15").tokenizer
    ids = tokenizer("a red circle", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        layers = encoder(ids, output_hidden_states=True).hidden_states
        expected = encoder.final_layer_norm(layers[-2])[0]
    plain, skipped = loaded_family("sd15").embed([Wording.plain("a red circle", skip) for skip in (0, 1)], bare)
    assert torch.allclose(skipped.context, expected, atol=1e-5)
    assert not torch.allclose(skipped.context, plain.context, atol=1e-2)
