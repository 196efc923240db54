"""What a picture says of itself: complete, readable by others, and enough to draw it again."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import orjson
import pytest
from PIL import Image

from models import infotext
from models.card import ModelCard
from models.engine import Engine
from models.errors import InvalidRequest
from models.images import MEDIA_TYPES, Picture, encode
from models.metadata import AI_GENERATED, read, write
from models.request import AdapterUse, EffectiveRequest, GenerationRequest
from models.samplers import SAMPLERS, SCHEDULE_LABELS, find_sampler, find_schedule
from tests.models.conftest import new_engine

CARD = ModelCard(name="sd15", family="sd", width=128, height=128, max_pixels=1024 * 1024)
GREY = np.full((64, 64, 3), 90, np.uint8)
REVISION = "0123456789abcdef"

AWKWARD = {
    "newlines": "a cat\non a mat\n\nat night",
    "quotes and commas": 'a "quoted, cat": with \\ and \'',
    "unicode": "ein Käse, 猫 und 🐈, ﷽",
    "settings": "a cat\nSteps: 3, Sampler: Euler, CFG scale: 1, Seed: 2",
    "parts": "a cat, Steps: 3, Negative prompt: dog",
    "spaces": "  a cat ",
    "control": "tab\tand\rreturn",
    "braces": '{"a": 1} <sic:x:1> (cat:1.3) [dog|cat]',
}


def picture(request: EffectiveRequest, format: str = "png", metadata: str = "full") -> bytes:
    return encode(GREY, format, write(request, REVISION, metadata))


def effective(**given: object) -> EffectiveRequest:
    return GenerationRequest(**{"model": "sd15", "prompt": "a cat", "seed": 5} | given).resolve(CARD)


def carrying(text: str) -> bytes:
    return encode(GREY, "png", {"parameters": text})


# Our own


@pytest.mark.parametrize("format", MEDIA_TYPES)
@pytest.mark.parametrize("prompt", AWKWARD.values(), ids=AWKWARD)
def test_any_prompt_comes_back_exactly(prompt: str, format: str):
    request = effective(prompt=prompt, negative_prompt=prompt, output_format=format)
    found = read(picture(request, format))
    assert (found.source, found.warnings) == ("heliograph", ())
    assert GenerationRequest(**found.parameters).resolve(CARD) == request


def test_every_field_comes_back():
    given = {
        "negative_prompt": "dog", "width": 192, "height": 256, "steps": 7, "guidance_scale": 3.25,
        "guidance_rescale": 0.7, "seed": 2**53 - 1, "sampler": "unipc", "schedule": "beta", "clip_skip": 2,
        "deep_cache": 3, "output_format": "webp",
    }  # fmt: skip
    found = read(picture(effective(**given), "webp"))
    assert found.parameters == {"model": "sd15", "prompt": "a cat"} | given
    assert (found.format, found.width, found.height) == ("webp", 64, 64)


def test_how_it_was_ordered_is_not_told():
    given = {"priority": "batch", "deadline_s": 9.0, "samples": 3, "preview_every": 2}
    first = effective(**given).sample(1)
    assert write(first, REVISION, "full") == write(effective(seed=6), REVISION, "full")
    assert read(picture(first)).parameters["seed"] == 6


def test_what_is_there_by_default_need_not_be_said():
    parameters = read(picture(effective())).parameters
    assert set(parameters) == {
        "model", "prompt", "width", "height", "steps", "guidance_scale", "seed", "sampler", "schedule",
        "deep_cache",
    }  # fmt: skip
    assert orjson.loads(write(effective(), REVISION, "full")["heliograph"])["parameters"]["clip_skip"] == 0


def test_a_picture_of_before_there_was_deep_cache_was_drawn_without():
    """Whatever the model does by default now."""
    document = orjson.loads(write(effective(), REVISION, "full")["heliograph"])
    del document["parameters"]["deep_cache"]
    texts = {"heliograph": orjson.dumps(document).decode()}
    found = read(encode(np.zeros((64, 64, 3), np.uint8), "png", texts))
    assert GenerationRequest(**found.parameters).resolve(replace(CARD, deep_cache=4)).deep_cache == 1


def test_input_pictures_are_told_by_size_and_hash():
    source = Picture.from_array(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    request = effective(image=source, denoise_strength=0.5)
    found = read(picture(request))
    digest = hashlib.sha256(source.data).hexdigest()
    assert found.warnings == (f"`image` has to be sent again: 96x64, sha256 {digest}",)
    assert "image" not in found.parameters
    assert GenerationRequest(**found.parameters, image=source).resolve(CARD) == request


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    image: Picture | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Later(EffectiveRequest):
    """A request as it may look one day."""

    parts: tuple[Part, ...] = ()
    whole: Part | None = None
    fraction: float = 0.5


def test_fields_that_are_yet_to_come_are_written_by_themselves():
    source = Picture.from_array(GREY)
    values = {field.name: getattr(effective(), field.name) for field in fields(EffectiveRequest)}
    parts = (Part(name="edges", image=source, weight=0.5), Part(name="plain"))
    later = Later(**values | {"parts": parts, "fraction": 0.25, "adapters": (AdapterUse(name="x", weight=0.8),)})
    told = orjson.loads(write(later, REVISION, "full")["heliograph"])["parameters"]
    digest = hashlib.sha256(source.data).hexdigest()
    assert told["parts"] == [
        {"name": "edges", "image": {"width": 64, "height": 64, "sha256": digest}, "weight": 0.5},
        {"name": "plain", "image": None, "weight": 1.0},
    ]
    assert (told["whole"], told["fraction"], told["adapters"]) == (None, 0.25, [{"name": "x", "weight": 0.8}])
    found = read(picture(later))
    assert [warning for warning in found.warnings if "no such field" in warning] == [
        f"`{name}` is left out: there is no such field here" for name in ("parts", "whole", "fraction")
    ]
    assert found.parameters["adapters"] == [{"name": "x", "weight": 0.8}]
    assert "a cat <lora:x:0.8>" in (found.infotext or "")


def test_minimal_tells_what_made_it_and_nothing_of_the_prompt():
    text = write(effective(prompt="a secret", negative_prompt="a secret"), REVISION, "minimal")
    assert "secret" not in str(text)
    assert orjson.loads(text["heliograph"]) == {
        "software": "Heliograph",
        "digital_source_type": AI_GENERATED,
        "revision": REVISION,
        "parameters": {"model": "sd15", "seed": 5},
    }
    found = read(encode(GREY, "jpeg", text))
    assert (found.source, found.parameters, found.infotext) == ("heliograph", {"model": "sd15", "seed": 5}, None)
    assert found.warnings == ("the metadata is minimal: it does not say the prompt",)


@pytest.mark.parametrize("format", MEDIA_TYPES)
def test_none_is_none(format: str):
    request = effective()
    assert picture(request, format, "none") == encode(GREY, format)
    found = read(picture(request, format, "none"))
    assert (found.source, found.parameters, found.infotext, found.warnings) == (None, {}, None, ())


EDITED = {
    "no JSON": ("{", "damaged"),
    "a list": ("[1]", "damaged"),
    "no parameters": ('{"parameters": 3}', "damaged"),
    "bottomless": ('{"parameters": ' + "[" * 10_000, "damaged"),
    "not a number": ('{"parameters": {"steps": NaN}}', "damaged"),
    "unknown": ('{"parameters": {"prompt": "x", "__class__": 1}}', "no such field"),
}


@pytest.mark.parametrize(("text", "word"), EDITED.values(), ids=EDITED)
def test_what_somebody_edited_does_no_harm(text: str, word: str):
    for format in ("png", "jpeg"):
        found = read(encode(GREY, format, {"heliograph": text}))
        if not (format == "jpeg" and not text.startswith("{")):
            assert word in " ".join(found.warnings)
        orjson.dumps(found.parameters)


def test_a_damaged_document_leaves_the_infotext():
    text = write(effective(steps=9), REVISION, "full") | {"heliograph": "{"}
    found = read(encode(GREY, "png", text))
    assert (found.source, found.parameters["steps"]) == ("a1111", 9)


def test_what_is_no_picture_is_refused():
    with pytest.raises(InvalidRequest) as refused:
        read(b"no picture", "upload")
    assert refused.value.field == "upload"


# A1111's


PORTRAIT = """masterpiece, (a cat:1.2), "quoted"
second line, Steps: none
Negative prompt: lowres, bad hands
(worst quality:1.4)
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 3141592653, Size: 512x768, Model hash: 45dee52b, Model: sd15, VAE hash: 735e4c3a44, Clip skip: 2, Version: v1.10.1"""  # noqa: E501


def test_an_infotext_of_a1111_becomes_a_request():
    found = read(carrying(PORTRAIT))
    assert found.source == "a1111"
    assert found.infotext == PORTRAIT
    assert found.parameters == {
        "prompt": 'masterpiece, (a cat:1.2), "quoted"\nsecond line, Steps: none',
        "negative_prompt": "lowres, bad hands\n(worst quality:1.4)",
        "steps": 28, "sampler": "dpmpp_2m", "schedule": "karras", "guidance_scale": 6.5, "seed": 3141592653,
        "width": 512, "height": 768, "model": "sd15", "clip_skip": 1,
    }  # fmt: skip
    assert found.warnings == (
        "`VAE hash: 735e4c3a44` is left out: there is nothing like it here",
        "another program's noise: the same seed draws another picture here",
    )


def settings(line: str) -> dict[str, object]:
    found = read(carrying(f"a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, {line}"))
    plain = {"prompt": "a cat", "steps": 20, "sampler": "euler", "schedule": "default", "guidance_scale": 7}
    return {name: value for name, value in found.parameters.items() if plain.get(name) != value}


def test_its_other_settings_are_understood():
    assert settings("Variation seed: 9, Variation seed strength: 0.25") == {
        "variation_seed": 9,
        "variation_strength": 0.25,
    }
    assert settings("Denoising strength: 0.6, Mask blur: 4, Inpaint area: Only masked, Masked area padding: 32") == {
        "denoise_strength": 0.6,
        "mask_blur": 4,
        "mask_region": "masked",
        "mask_padding": 32,
    }
    assert settings("Masked content: latent noise") == {"mask_fill": "noise"}
    assert settings("Denoising strength: 0.6, Hires upscale: 1.5, Hires steps: 12, Hires upscaler: Latent") == {
        "hires": {"scale": 1.5, "steps": 12, "denoise_strength": 0.6, "upscaler": "latent"}
    }
    assert settings("Hires upscale: 2, Hires steps: 0") == {"hires": {"scale": 2}}


@pytest.mark.parametrize(
    ("line", "sampler", "schedule"),
    [
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M", "dpmpp_2m", "default"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "dpmpp_2m_sde", "exponential"),
        ("Schedule type: SGM Uniform, Sampler: Euler", "euler", "sgm_uniform"),
        ("Sampler: Euler a, Schedule type: Automatic", "euler_a", "default"),
        ("Sampler: Euler a, Schedule type: Karras", "euler_a", None),
        ("Sampler: Euler, Schedule type: Align Your Steps", "euler", None),
        ("Sampler: DPM adaptive", None, None),
        ("Sampler: PLMS", "pndm", "default"),
    ],
)
def test_samplers_go_by_a1111s_names(line: str, sampler: str | None, schedule: str | None):
    found = read(carrying(f"a cat\nSteps: 20, {line}, CFG scale: 7"))
    assert (found.parameters.get("sampler"), found.parameters.get("schedule")) == (sampler, schedule)
    assert (len(found.warnings) > 1) == (schedule is None)


def test_labels_name_their_own_sampler():
    for name, sampler in SAMPLERS.items():
        assert find_sampler(sampler.label) == (name, None)
        for schedule in sampler.schedules:
            assert find_sampler(f"{sampler.label} {SCHEDULE_LABELS[schedule]}") == (name, schedule)
    assert {find_schedule(label) for label in SCHEDULE_LABELS.values()} == set(SCHEDULE_LABELS)


ODD = {
    "Steps: 20, Sampler: Euler, Seed: -9223372036854775809, CFG scale: nan, Size: 5x, Clip skip: two": {
        "Seed", "CFG scale", "Size", "Clip skip"
    },
    "Steps: " + "9" * 5000 + ", Sampler: , CFG scale: 1e999, Masked content: magic": {
        "Steps", "Sampler", "CFG scale", "Masked content"
    },
    'Steps: 1, Sampler: Euler, Lora hashes: "a: b, c: d", Template: "\\ud800", TI: "open': {
        "Lora hashes", "Template", "TI"
    },
}  # fmt: skip


@pytest.mark.parametrize(("line", "left"), ODD.items(), ids=["numbers", "sizes", "quotes"])
def test_settings_that_make_no_sense_are_told(line: str, left: set[str]):
    found = read(carrying(f"a cat\n{line}"))
    assert {warning[1:].split(":")[0] for warning in found.warnings[:-1]} == left
    orjson.dumps([found.parameters, found.warnings])


@pytest.mark.parametrize("text", ["", "a cat", "a cat\nNegative prompt: dog", '{"prompt": "x"}', "Steps: 3"])
def test_other_texts_are_not_taken_for_infotext(text: str):
    found = read(carrying(text))
    assert (found.source, found.parameters) == (None, {})
    assert found.warnings == ("the text under `parameters` is no infotext of A1111's kind",)


def test_lines_that_extensions_add_below_do_no_harm():
    found = read(
        carrying("a cat\nSteps: 20, Sampler: Euler, CFG scale: 7\nTemplate: a {cat|dog}\nNegative Template: x")
    )
    assert (found.parameters["prompt"], found.parameters["steps"]) == ("a cat", 20)


def test_an_empty_prompt_is_a_prompt():
    text = infotext.parse("Negative prompt: dog\nSteps: 20, Sampler: Euler, CFG scale: 7")
    assert text is not None
    assert (text.prompt, text.negative_prompt) == ("", "dog")


def test_parsing_takes_time_in_proportion():
    assert infotext.parse("Steps: 1, b: 2, " + "x" * 4_000_000) is None
    assert infotext.parse("Steps: 1, b: 2, " + "x" * 50_000 + ', c: "' * 8_000) is not None
    assert infotext.parse("Steps: 1, b: 2, " + 'c: "' * 20_000) is not None


@pytest.mark.parametrize("prompt", [p for name, p in AWKWARD.items() if name != "spaces"], ids=lambda p: p[:12])
def test_infotext_that_we_write_is_read_back(prompt: str):
    request = effective(prompt=prompt, negative_prompt="a dog", clip_skip=1, guidance_scale=4.5, sampler="heun")
    parsed = infotext.parse(write(request, REVISION, "full")["parameters"])
    assert parsed is not None
    values, left = infotext.fields(parsed)
    assert not left
    assert GenerationRequest(**values).resolve(CARD) == request


def test_infotext_reads_as_a1111_writes_it():
    request = effective(negative_prompt="dog", steps=20, guidance_scale=7.0, clip_skip=1)
    assert write(request, REVISION, "full")["parameters"] == (
        "a cat\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0, Seed: 5, "
        "Size: 128x128, Model hash: 0123456789, Model: sd15, Clip skip: 2"
    )
    source = Picture.from_array(GREY)
    values = write(effective(image=source, denoise_strength=0.5, model="sd15"), REVISION, "full")["parameters"]
    assert values.endswith("Denoising strength: 0.5")
    assert "Negative" not in values


def test_infotext_of_the_fields_to_come():
    values = {
        "prompt": "a cat", "negative_prompt": "", "steps": 20, "sampler": "euler", "schedule": "default",
        "guidance_scale": 7.5, "seed": 1, "width": 64, "height": 64, "model": "a, b", "clip_skip": 0,
        "variation_seed": 3, "variation_strength": 0.5, "image": {"width": 1}, "mask": {"width": 1},
        "denoise_strength": 0.75, "mask_blur": 4, "mask_region": "masked", "mask_fill": "noise", "mask_padding": 16,
        "hires": {"scale": 2.0, "steps": 8, "denoise_strength": 0.4, "upscaler": "lanczos"},
    }  # fmt: skip
    text = infotext.compose(values, "not a hash")
    assert text.splitlines()[-1] == (
        "Steps: 20, Sampler: Euler, Schedule type: Uniform, CFG scale: 7.5, Seed: 1, Size: 64x64, "
        'Model hash: not a hash, Model: "a, b", Variation seed: 3, Variation seed strength: 0.5, '
        "Denoising strength: 0.4, Mask blur: 4, Inpaint area: Only masked, Masked content: latent noise, "
        "Masked area padding: 16, Hires upscale: 2.0, Hires steps: 8, Hires upscaler: Lanczos"
    )
    parsed = infotext.parse(text)
    assert parsed is not None
    found, left = infotext.fields(parsed)
    assert not left
    told = values | found
    assert told == values


# Drawn again


@pytest.fixture(scope="module")
def drawing() -> Iterator[Engine]:
    engine = new_engine("sd15")
    yield engine
    engine.close()


@pytest.mark.parametrize("format", MEDIA_TYPES)
def test_a_request_rebuilt_from_a_picture_draws_the_same_picture(drawing: Engine, format: str):
    wanted = GenerationRequest(
        model="sd15", prompt="a (red:1.1) circle,\non a blue background", negative_prompt="Käse: green", steps=4,
        guidance_scale=5.5, seed=77, sampler="euler_a", clip_skip=1, output_format=format,
    ).resolve(drawing.card)  # fmt: skip
    first = drawing.generate([wanted])[0][0]
    with Image.open(io.BytesIO(first.data)) as image:
        pixels = np.asarray(image.convert("RGB"))
    data = encode(pixels, format, write(wanted, drawing.revision, "full"))
    again = drawing.generate([GenerationRequest(**read(data).parameters)])[0][0]
    assert again.data == first.data
