"""A request as a job's row keeps it, and back: nothing is lost on the way."""

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from app.jobs import canonical, inputs, outputs
from app.keys.budgets import pixel_steps
from app.stores.folder import Folder
from app.stores.links import Links
from models.card import ModelCard
from models.errors import InvalidRequest
from models.events import Finished, Timings
from models.images import Picture, encode
from models.parts import AdapterUse, ArmUse, ControlUse, Hires, Outpaint, Upscale
from models.prompt import PromptReport
from models.request import EffectiveRequest, GenerationRequest


def noise(seed: int) -> Picture:
    return Picture.from_array(np.random.default_rng(seed).integers(0, 256, (16, 24, 3), np.uint8))


# Every field, with another value than its default. Not a request that any model would take.
EVERYTHING = EffectiveRequest(
    model="sd15",
    prompt="a red circle",
    negative_prompt="blue",
    prompt_syntax="plain",
    width=64,
    height=72,
    steps=3,
    guidance_scale=2.5,
    guidance_rescale=0.5,
    seed=2**53 - 1,
    samples=2,
    variation_seed=4,
    variation_strength=0.25,
    sampler="euler",
    schedule="karras",
    clip_skip=1,
    deep_cache=3,
    image=noise(1),
    denoise_strength=0.125,
    guidance_input=True,
    mask=noise(2),
    mask_blur=1,
    mask_grow=2,
    mask_fill="noise",
    mask_region="masked",
    mask_padding=3,
    paste_back=False,
    noise_level=5,
    outpaint=Outpaint(left=8),
    hires=Hires(scale=1.5, steps=2, denoise_strength=0.5, upscaler="lanczos"),
    stop_at_step=2,
    controls=(ControlUse(name="canny", image=noise(3), weight=0.5, start=0.1, end=0.9, preprocessor="canny"),),
    adapters=(AdapterUse(name="moon", weight=-0.5),),
    upscale=Upscale(scale=1.5, model="2x"),
    output_format="webp",
    metadata="full",
    priority="batch",
    deadline_s=8.5,
    preview_every=3,
    experiments=(ArmUse(experiment="steps", arm="control", assigned="fast", version="v1", unit="somebodys"),),
)


@pytest.fixture
def pictures(tmp_path: Any) -> Folder:
    return Folder(tmp_path / "pictures", Links(b"s" * 32))


def test_the_example_has_every_field():
    plain = EffectiveRequest(model="", prompt="")
    assert not [f.name for f in fields(EffectiveRequest) if getattr(EVERYTHING, f.name) == getattr(plain, f.name)]


async def test_every_field_of_a_request_comes_back(pictures: Folder):
    keys = await inputs.keep(pictures, inputs.new_folder(), (noise(1), noise(2), noise(3)))
    values = json.loads(json.dumps(canonical.to_json(EVERYTHING, keys)))
    assert sorted(canonical.keys_of(values)) == sorted(keys.values())
    found = await inputs.load(pictures, values)
    assert canonical.from_json(values, found.__getitem__) == EVERYTHING
    hollow = canonical.from_json(values)
    assert hollow.image == Picture(width=24, height=16, data=b"")
    assert pixel_steps(hollow) == pixel_steps(EVERYTHING)


def test_what_a_version_before_did_is_written_as_it_wrote_it():
    """So that runners of both understand each other while one takes the other's place, and the cache finds it."""
    before = {"model", "prompt", "width", "height", "steps", "guidance_scale", "seed", "sampler", "schedule"}
    card = ModelCard(name="sd15", family="sd", width=64, height=64, max_pixels=64**2)
    usual = GenerationRequest(model="sd15", prompt="x").resolve(card)
    assert set(canonical.to_json(usual, {})) == before | {"denoise_strength"}
    assert canonical.from_json(canonical.to_json(usual, {})) == usual
    assert canonical.to_json(replace(usual, deep_cache=2), {})["deep_cache"] == 2


async def test_a_picture_that_stands_twice_is_stored_once(pictures: Folder):
    keys = await inputs.keep(pictures, inputs.new_folder(), (noise(1), noise(1)))
    assert len(keys) == 1


def test_a_request_of_another_version_is_refused_by_its_field():
    values = canonical.to_json(EffectiveRequest(model="sd15", prompt="x"), {})
    with pytest.raises(InvalidRequest, match="another version"):
        canonical.from_json(values | {"aura": 1})


def test_a_picture_to_enlarge_comes_back():
    request = canonical.UpscaleRequest(key="inputs/a/0", upscale=Upscale(scale=1.5, model="2x"), output_format="webp")
    assert canonical.upscale_from_json(json.loads(json.dumps(canonical.upscale_to_json(request)))) == request


async def test_a_finished_picture_comes_back_with_all_that_was_told_of_it(pictures: Folder):
    picture = Finished(
        index=1,
        seed=7,
        data=encode(noise(4).array(), "png"),
        format="png",
        width=24,
        height=16,
        revision="abc",
        timings=Timings(queued_s=0.1, encode_s=0.2, denoise_s=0.3, decode_s=0.4, upscale_s=0.5),
        prompts={"prompt": PromptReport(tokens=3, chunks=1, truncated="and more")},
        warnings=("guidance plays no part",),
    )
    output = json.loads(json.dumps(await outputs.keep(pictures, "ab" * 16, 2, picture)))
    assert output["key"] == f"results/{'ab' * 16}/2-1"
    assert (await pictures.head(output["key"])).sha256 == output["sha256"]
    assert outputs.finished(output, await pictures.get(output["key"])) == picture
