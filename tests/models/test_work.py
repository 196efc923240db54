"""Work is told without torch and before preparation, and is what the prepared sequences say."""

import math
import time
from itertools import pairwise
from typing import Any

import pytest

from models.card import ModelCard
from models.engine import Engine
from models.errors import DeadlineTooShort, InvalidRequest, Overloaded
from models.parts import ControlUse, Hires, Outpaint
from models.registered import Adapters
from models.request import GenerationRequest
from models.samplers import SAMPLERS, evaluations
from models.tapes import Tapes
from models.work import CONTROL, DECODE, ENCODE, breadth, work
from tests.models.conftest import folder, loaded_family, new_engine, sketch

POSITIONS = 16 * 16  # of a picture of 128 px


def ask(**fields) -> GenerationRequest:
    fields = {"model": "sd15", "prompt": "a red circle", "steps": 6, "seed": 1, "sampler": "euler"} | fields
    return GenerationRequest(**fields)


@pytest.fixture(scope="module")
def engine() -> Engine:
    card = ModelCard.read("sd15", "sd", folder("sd15"))
    nets = {"canny": "models/embedded/controlnets/canny-sd15"}
    return Engine(loaded_family("sd15"), card, adapters=Adapters(loaded_family("sd15"), controlnets=nets))


def prepared(engine: Engine, request: GenerationRequest) -> float:
    sequences = engine._preparation.sequences(request.resolve(engine.card), "", time.monotonic())
    return sum(sequence.work for sequence in sequences)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_samplers_forwards_are_known_without_compiling_it(sampler: str):
    tapes = Tapes(loaded_family("sd15").scheduler_config)
    compiled = 0
    for steps in (1, 2, 9):
        for strength in (None, 0.6, 0.05):
            try:
                tape = tapes.get(sampler, "default", steps, strength)
            except InvalidRequest:  # diffusers has no such thing
                continue
            assert evaluations(sampler, steps, strength) == len(tape), (steps, strength)
            compiled += 1
    assert compiled >= 6


def canny(**options) -> ControlUse:
    return ControlUse(name="canny", image=sketch(), preprocessor="canny", **options)


KINDS = {
    "plain": {},
    "unguided": {"guidance_scale": 1.0},
    "samples": {"samples": 3},
    "composed": {"prompt": "a red circle AND a blue square AND a star"},
    "two to a step": {"sampler": "heun"},
    "pndm": {"sampler": "pndm"},
    "2s": {"sampler": "dpmpp_2s"},
    "large": {"width": 192, "height": 96},
    "img2img": {"image": sketch(), "denoise_strength": 0.5},
    "img2img, whole": {"image": sketch(), "denoise_strength": 1.0},
    "inpaint": {"image": sketch(), "mask": sketch(), "denoise_strength": 0.5, "mask_fill": "noise"},
    "outpaint": {"image": sketch(), "outpaint": Outpaint(left=64)},
    "hires": {"hires": Hires(scale=1.5, denoise_strength=0.6)},
    "hires, lanczos": {"hires": Hires(scale=1.5, steps=4, denoise_strength=0.6, upscaler="lanczos")},
    "hires, stopped in it": {"hires": Hires(scale=1.5, denoise_strength=0.6), "stop_at_step": 8},
    "hires, stopped before it": {"hires": Hires(scale=1.5, denoise_strength=0.6), "stop_at_step": 4},
    "stopped": {"stop_at_step": 2},
    "steered": {"controls": (canny(), canny(start=0.5))},
    "steered by nothing": {"controls": (canny(weight=0.0),)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_what_the_sequences_say(engine: Engine, kind: str):
    request = ask(**KINDS[kind])
    assert work(request.resolve(engine.card)) == pytest.approx(prepared(engine, request), rel=1e-9)


def test_what_things_cost_beside_each_other(engine: Engine):
    def cost(**fields) -> float:
        return work(ask(**fields).resolve(engine.card))

    assert cost() == pytest.approx(POSITIONS * (2 * 6 + DECODE))
    assert cost(guidance_scale=1.0) == pytest.approx(POSITIONS * (6 + DECODE))
    assert cost(prompt="a AND b") == pytest.approx(POSITIONS * (3 * 6 + DECODE))
    assert cost(sampler="heun") == pytest.approx(POSITIONS * (2 * 11 + DECODE))
    assert cost(samples=4) == pytest.approx(4 * cost())
    assert cost(width=256) == pytest.approx(2 * cost())
    assert cost(image=sketch(), denoise_strength=0.5) == pytest.approx(POSITIONS * (2 * 3 + DECODE + ENCODE))
    assert cost(controls=(canny(), canny(end=0.5))) == pytest.approx(POSITIONS * (2 * 6 * (1 + 1.5 * CONTROL) + DECODE))
    assert breadth(ask(samples=2, controls=(canny(),)).resolve(engine.card)) == pytest.approx(
        4 * POSITIONS * (1 + CONTROL)
    )


def test_work_becomes_less_with_every_step_and_is_nothing_in_the_end():
    engine = new_engine("sd15")
    request = ask(samples=2, hires=Hires(scale=1.5, denoise_strength=0.6, upscaler="lanczos"), steps=3)
    engine.submit(request, lambda event: None, progress=False)
    told = [engine.load().work_left]
    while engine.step():
        told.append(engine.load().work_left)
    assert told[0] == pytest.approx(work(request.resolve(engine.card)))
    assert all(later < earlier for earlier, later in pairwise(told))
    assert told[-1] == 0


def test_a_request_that_is_accepted_early_has_only_its_decoding_left():
    engine = new_engine("sd15")
    id = engine.submit(ask(steps=50), lambda event: None, progress=False)
    for _ in range(3):
        engine.step()
    engine.accept(id)
    assert engine.load().work_left == pytest.approx(POSITIONS * DECODE)


class Sleeping:
    """A family whose network takes a made-up time and does nothing."""

    def __init__(self, forward_s: float, row_s: float):
        self._family = loaded_family("sd15")
        self._times = forward_s, row_s

    def __getattr__(self, name):
        return getattr(self._family, name)

    def predict(self, latents, timesteps, rows, residuals=None):
        time.sleep(self._times[0] + self._times[1] * latents[:, 0].numel() / POSITIONS)
        return 0.5 * latents


def sleeping_engine(**options) -> Engine:
    family: Any = Sleeping(0.010, 0.004)
    engine = Engine(family, ModelCard.read("sd15", "sd", folder("sd15")), **options)
    engine.warm_up(cap=8)
    return engine


def burst(engine: Engine) -> None:
    for seed in range(12):
        steps, side = (4, 8, 12)[seed % 3], (128, 128, 192, 128)[seed % 4]
        engine.submit(ask(seed=seed, steps=steps, width=side, height=side), lambda event: None, progress=False)


def test_what_is_left_is_known_when_a_burst_arrives():
    """And before any request has run: the pace is measured at warm-up."""
    engine = sleeping_engine()
    assert engine.load().seconds_per_work > 0
    burst(engine)  # on a busy machine what is not made up takes longer than it seemed, which one burst tells
    while engine.step():
        pass
    burst(engine)
    told, began = engine.load(), time.monotonic()
    while engine.step():
        pass
    took = time.monotonic() - began
    assert told.seconds_left == told.work_left * told.seconds_per_work
    assert took / 1.5 < told.seconds_left < took * 1.5


def known_pace(**options) -> Engine:
    """One whose forwards of a picture seem to take a second."""
    engine = Engine(loaded_family("sd15"), ModelCard.read("sd15", "sd", folder("sd15")), **options)
    engine.pace.learn({POSITIONS: 0.5, 2 * POSITIONS: 1.0}, usual=2 * POSITIONS, full=16 * POSITIONS)
    return engine


def test_an_engine_refuses_deadlines_that_it_cannot_keep():
    engine = known_pace()
    with pytest.raises(DeadlineTooShort) as refused:
        engine.submit(ask(steps=20, deadline_s=5.0), lambda event: None)
    assert refused.value.least_s == pytest.approx(20 + DECODE / 2, rel=0.01)
    for _ in range(3):
        engine.submit(ask(steps=20, deadline_s=40.0), lambda event: None)
    with pytest.raises(Overloaded) as busy:
        engine.submit(ask(steps=20, deadline_s=41.0), lambda event: None)
    assert 1 <= busy.value.retry_after_s < 10
    engine.submit(ask(steps=20, deadline_s=41.0), lambda event: None, key="another")


def test_an_engine_is_bounded_in_seconds():
    engine = known_pace(max_wait_s=30.0)
    for _ in range(2):
        engine.submit(ask(steps=20), lambda event: None, key="a")
    with pytest.raises(Overloaded) as refused:
        engine.submit(ask(steps=1), lambda event: None, key="a")
    assert refused.value.retry_after_s == pytest.approx(2 * (20 + DECODE / 2) - 30, rel=0.01)
    engine.submit(ask(steps=1), lambda event: None, key="b")
    assert math.isclose(engine.load().seconds_left, 41 + 3 * DECODE / 2, rel_tol=0.01)
