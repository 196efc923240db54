"""Which requests draw the same, and how those at the same time are drawn once."""

import asyncio
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from app.cache import Flights, fingerprint, is_repeatable
from models.errors import GenerationFailed
from models.images import Picture
from models.parts import AdapterUse, ArmUse, ControlUse, Hires, Outpaint, Upscale
from models.request import EffectiveRequest, GenerationRequest
from tests.app.conftest import CARDS, ORIGIN
from tests.app.loopback import until

WHITE, BLACK = (Picture(width=64, height=64, data=bytes([value]) * (3 * 64 * 64)) for value in (255, 0))
PLAIN = GenerationRequest(model="sd15", prompt="x", seed=7).resolve(CARDS["sd15"])
# For each field another value than that of PLAIN; whether the two fit together is not asked here.
OTHER: dict[str, Any] = {
    "model": "sdxl",
    "prompt": "y",
    "negative_prompt": "y",
    "prompt_syntax": "plain",
    "width": 64,
    "height": 64,
    "steps": 3,
    "guidance_scale": 3.0,
    "guidance_rescale": 0.5,
    "seed": 8,
    "samples": 2,
    "variation_seed": 8,
    "variation_strength": 0.5,
    "sampler": "ddim",
    "schedule": "default",
    "clip_skip": 1,
    "deep_cache": 3,
    "image": WHITE,
    "denoise_strength": 0.5,
    "guidance_input": True,
    "mask": WHITE,
    "mask_blur": 1,
    "mask_grow": 1,
    "mask_fill": "noise",
    "mask_region": "masked",
    "mask_padding": 1,
    "paste_back": False,
    "noise_level": 5,
    "outpaint": Outpaint(left=8),
    "hires": Hires(steps=3),
    "stop_at_step": 3,
    "controls": (ControlUse(name="canny", image=WHITE),),
    "adapters": (AdapterUse(name="moon"),),
    "upscale": Upscale(model="lanczos"),
    "output_format": "webp",
    "metadata": "full",
}
ARM = ArmUse(experiment="steps", arm="fast", assigned="fast", version="v1", unit="somebodys")
ORDER = {"priority": "batch", "deadline_s": 9.0, "preview_every": 5, "experiments": (ARM,)}


@pytest.mark.parametrize("name", [field.name for field in fields(EffectiveRequest)])
def test_every_field_that_plays_a_part_makes_another_fingerprint(name: str):
    other = replace(PLAIN, **{name: (OTHER | ORDER)[name]})
    assert (fingerprint(other) != fingerprint(PLAIN)) == (name in OTHER)


def test_pictures_count_by_what_they_hold():
    with_white, with_black = (replace(PLAIN, image=image) for image in (WHITE, BLACK))
    assert fingerprint(with_white) == fingerprint(replace(PLAIN, image=replace(WHITE)))
    assert fingerprint(with_white) != fingerprint(with_black)


def test_weights_count_by_what_they_hold():
    moon = replace(ORIGIN, adapters={"lora:moon": "ab"})
    origins = [ORIGIN, replace(ORIGIN, revision="def"), moon, replace(ORIGIN, adapters={"lora:moon": "cd"})]
    for origin in origins:
        drawn = {"revision": origin.revision, "adapters": dict(origin.adapters), "device": "another"}
        assert [other.drew(drawn) for other in origins] == [other is origin for other in origins]


@pytest.mark.parametrize(
    ("options", "repeatable"),
    [
        ({"seed": 7}, True),
        ({}, False),
        ({"seed": 7, "variation_strength": 0.2}, False),
        ({"seed": 7, "variation_strength": 0.2, "variation_seed": 3}, True),
        ({"seed": 7, "upscale": Upscale(model="lanczos")}, True),
        ({"seed": 7, "upscale": Upscale(model="2x")}, False),
        ({"seed": 7, "upscale": Upscale()}, False),
    ],
)
def test_what_the_caller_left_to_chance_is_not_repeatable(options: dict[str, Any], repeatable: bool):
    assert is_repeatable(GenerationRequest(model="sd15", prompt="x", **options)) is repeatable


class Work:
    """Counts how often it is done; it waits for its gate, and then fails as often as it is told to."""

    def __init__(self, failures: int = 0):
        self.begun, self.failures, self.gate = 0, failures, asyncio.Event()

    async def __call__(self) -> str:
        self.begun += 1
        await self.gate.wait()
        await asyncio.sleep(0.01)  # as drawing does, which is never done at once
        self.failures -= 1
        if self.failures >= 0:
            raise GenerationFailed("engine_fault")
        return "a picture"


async def join(flights: Flights[str], about: str, work: Work, patience_s: float = 60.0) -> tuple[str, bool]:
    """What the work gives, and whether somebody else has done it."""
    found = await flights.joined(about, patience_s)
    if found is not None:
        return found, True
    with flights.lead(about) as flight:
        flight.set_result(await work())
        return flight.result(), False


async def test_fifty_at_a_time_are_done_once():
    flights, work = Flights[str](), Work()
    waiting = [asyncio.create_task(join(flights, "x", work)) for _ in range(50)]
    other = asyncio.create_task(join(flights, "y", work))
    await asyncio.sleep(0)
    work.gate.set()
    assert sorted(joined for _, joined in await asyncio.gather(*waiting)) == [False] + [True] * 49
    assert await other == ("a picture", False)
    assert work.begun == 2


async def test_who_comes_after_the_end_is_not_served_from_it():
    flights, work = Flights[str](), Work()
    work.gate.set()
    assert await join(flights, "x", work) == await join(flights, "x", work) == ("a picture", False)
    assert work.begun == 2


async def test_who_leads_and_is_cancelled_takes_nobody_along():
    flights, work = Flights[str](), Work()
    first, *others = [asyncio.create_task(join(flights, "x", work)) for _ in range(5)]
    await asyncio.sleep(0)
    first.cancel()
    await until(lambda: work.begun == 2)
    work.gate.set()
    assert sorted(joined for _, joined in await asyncio.gather(*others)) == [False, True, True, True]
    assert first.cancelled()
    assert work.begun == 2


@dataclass(frozen=True, kw_only=True)
class Later(EffectiveRequest):
    """A request as it may look one day."""

    fraction: float = 0.5


def test_a_field_that_is_yet_to_come_leaves_fingerprints_what_they_are():
    assert fingerprint(Later(**vars(PLAIN))) == fingerprint(PLAIN)
    assert fingerprint(Later(**vars(PLAIN), fraction=0.25)) != fingerprint(PLAIN)


async def test_who_follows_and_is_cancelled_is_alone_in_that():
    flights, work = Flights[str](), Work()
    first, second, third = [asyncio.create_task(join(flights, "x", work)) for _ in range(3)]
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    work.gate.set()
    assert await asyncio.gather(first, third) == [("a picture", False), ("a picture", True)]
    assert work.begun == 1


async def test_who_leads_and_fails_is_alone_in_that():
    flights, work = Flights[str](), Work(failures=2)
    waiting = [asyncio.create_task(join(flights, "x", work)) for _ in range(5)]
    await asyncio.sleep(0)
    work.gate.set()
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends].count(GenerationFailed) == 2
    assert [end for end in ends if isinstance(end, tuple)].count(("a picture", True)) == 2
    assert work.begun == 3


async def test_nobody_waits_for_ever():
    flights, work = Flights[str](), Work()
    leading = asyncio.create_task(join(flights, "x", work))
    await asyncio.sleep(0)
    with pytest.raises(GenerationFailed, match="in time"):
        await join(flights, "x", work, patience_s=0.05)
    work.gate.set()
    assert await leading == ("a picture", False)


async def test_what_is_not_to_be_shared_is_done_by_the_next():
    flights, work = Flights[str](), Work()
    with flights.lead("x"):
        waiting = asyncio.create_task(join(flights, "x", work))
        await asyncio.sleep(0)
    work.gate.set()
    assert await waiting == ("a picture", False)
