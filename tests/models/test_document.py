"""Requests as JSON documents and back, over every field."""

from dataclasses import dataclass, fields, replace
from typing import Any

import orjson
import pytest

from models import document
from models.card import ModelCard
from models.errors import InvalidRequest
from models.images import Picture
from models.metadata import named
from models.parts import AdapterUse, ArmUse, ControlUse, Hires, Outpaint, Upscale
from models.request import EffectiveRequest, GenerationRequest

CARD = ModelCard(name="sd15", family="sd", width=128, height=128, max_pixels=1024 * 1024)
GREY, BLACK = (Picture(width=128, height=128, data=bytes([value]) * (3 * 128 * 128)) for value in (128, 0))
ARM = ArmUse(experiment="steps", arm="control", assigned="fast", version="v1", unit="somebodys")


@dataclass(frozen=True, kw_only=True)
class Later(EffectiveRequest):
    """A request as it may look one day."""

    fraction: float = 0.5


def there_and_back(request: EffectiveRequest) -> EffectiveRequest:
    pictures = {named(one)["sha256"]: one for one in document.pictures(request)}
    told = orjson.loads(orjson.dumps(document.write(request, named)))
    assert [name["sha256"] for name in document.names(told)] == [*pictures]
    return document.read(told, lambda name: pictures[name["sha256"]])


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "a red circle"},
        {"prompt": "x", "image": GREY, "mask": BLACK, "mask_fill": "noise", "mask_region": "masked", "mask_blur": 9},
        {"prompt": "x", "image": GREY, "outpaint": Outpaint(left=64, top=8), "upscale": Upscale(scale=3.0)},
        {"prompt": "x", "hires": Hires(scale=1.5), "adapters": (AdapterUse(name="moon", weight=-0.5),), "seed": 2**40},
        {"prompt": "x", "controls": (ControlUse(name="canny", image=BLACK, end=0.5, preprocessor="canny"),)},
        {"prompt": "x", "experiments": (ARM,)},
    ],
)
def test_a_request_comes_back_as_it_was(options: dict[str, Any]):
    request = GenerationRequest(model="sd15", **options).resolve(CARD)
    assert there_and_back(request) == request


def test_every_field_is_in_the_whole_document():
    told = document.write(GenerationRequest(model="sd15", prompt="x").resolve(CARD), named, whole=True)
    assert {*told} == {field.name for field in fields(EffectiveRequest)}


def test_what_is_decided_is_in_the_document_and_what_is_there_by_default_is_not():
    request = GenerationRequest(model="sd15", prompt="x", seed=0, adapters=(AdapterUse(name="moon"),)).resolve(CARD)
    told = document.write(request, named)
    decided = {"width", "height", "steps", "guidance_scale", "seed", "sampler", "schedule", "denoise_strength"}
    assert {*told} == {"model", "prompt", "adapters"} | decided
    assert (told["seed"], told["adapters"]) == (0, [{"name": "moon"}])


def test_a_field_that_is_yet_to_come_is_in_the_documents_of_those_alone_who_use_it():
    now = GenerationRequest(model="sd15", prompt="x", seed=1).resolve(CARD)
    later = Later(**vars(now))
    assert document.write(later, named) == document.write(now, named)
    assert there_and_back(later) == now
    told = document.write(replace(later, fraction=0.25), named)
    assert told["fraction"] == 0.25
    with pytest.raises(InvalidRequest, match="another version"):
        document.read(told, lambda _: GREY)


def test_a_field_that_nobody_knows_is_named():
    told = document.write(GenerationRequest(model="sd15", prompt="x").resolve(CARD), named)
    control = {"name": "canny", "image": named(GREY), "style": "cubist"}
    for wrong, field in (
        ({"style": "cubist"}, "style"),
        ({"hires": {"scale": 1.5, "style": "cubist"}}, "hires.style"),
        ({"adapters": [{"name": "moon"}, {"name": "sun", "style": "cubist"}]}, "adapters.1.style"),
        ({"controls": [control]}, "controls.0.style"),
        ({"experiments": [vars(ARM) | {"style": "cubist"}]}, "experiments.0.style"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            document.read({**told, **wrong}, lambda _: GREY)
        assert refused.value.field == field
