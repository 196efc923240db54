"""Captured forwards: the numbers that the plain ones give, whoever joins or leaves, and what is not captured."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import captured
from models.adapters import lora
from models.captured import KINDS, SIZES, WORTH, Captured, Outputs, Record
from models.engine import Engine
from models.errors import InvalidRequest
from models.forward import Inputs, forward, leaves, planted
from models.parts import AdapterUse
from models.request import GenerationRequest
from models.weights import place
from tests.models.conftest import drawn, new_engine
from tests.models.recorded import Recorded
from tests.models.test_mixture import engine as mixed_engine
from tests.models.test_mixture import mixture

SHAPE = (4, 8, 8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The stand-in hears the thread that calls."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def capturing(engine: Engine, record: Record = Recorded) -> Captured:
    """The engine's forwards are captured from now on."""
    denoiser = engine._denoiser
    denoiser.captured = Captured(denoiser._plain, lambda: record)
    return denoiser.captured


def ask(seed: int, **options) -> GenerationRequest:
    asked = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 8, "sampler": "dpmpp_2m"}
    return GenerationRequest(model="sd15", seed=seed, **asked | options)


def pictures(engine: Engine, requests: list[GenerationRequest]) -> list[np.ndarray]:
    return [drawn(one.data) for [one] in engine.generate(requests)]


def test_everything_the_craft_knows_is_drawn_as_it_is_without():
    requests = list(mixture().values())
    plain, faster = mixed_engine(), mixed_engine()
    for engine in (plain, faster):
        engine.batcher.set_cap((4, 16, 16), 64)
    made = capturing(faster)
    expected = pictures(plain, requests)
    for _ in range(WORTH + 1):
        found = pictures(faster, requests)
    assert made.rows > 100  # were replayed
    for name, ours, theirs in zip(mixture(), found, expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1, name


def test_who_joins_and_leaves_changes_nothing_for_the_others():
    """Batches of many sizes on one recording after the other, with what the one before has left in their places."""
    requests = [
        ask(seed, steps=5 + 7 * seed % 11, guidance_scale=(7.5, 1.0, 3.0)[seed % 3], sampler=sampler)
        for seed, sampler in enumerate(("dpmpp_2m", "euler_a", "heun", "lcm", "unipc", "ddim", "lms", "euler"))
    ]
    expected = [pictures(new_engine("sd15"), [request])[0] for request in requests]
    engine = new_engine("sd15")
    made = capturing(engine)
    engine.batcher.set_cap(SHAPE, 7)  # not all of them together
    for _ in range(3):
        found = pictures(engine, requests)
    assert made.rows > 100
    assert made.padded
    for request, ours, theirs in zip(requests, found, expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1, request.sampler


def test_a_picture_that_has_left_is_not_drawn_over_by_those_who_stay():
    """It waits for the decoder, and the answer to the next replay lies where its own did."""
    engine = new_engine("sd15")
    made = capturing(engine)
    engine.generate([ask(seed, steps=2 * WORTH) for seed in range(2)])
    events: list = []
    engine._delivery.take = lambda live=(): []
    for seed, steps in ((7, 4), (8, 9)):
        engine.submit(ask(seed, steps=steps), events.append, progress=False)
    while len(engine._delivery.queue) < 2:
        engine.step()
    assert made.rows
    del engine._delivery.take
    while len(events) < 2:
        engine.step()
    found = {event.seed: drawn(event.data) for event in events}
    for seed, steps in ((7, 4), (8, 9)):
        [alone] = pictures(new_engine("sd15"), [ask(seed, steps=steps)])
        assert np.abs(found[seed] - alone).max() <= 1


def test_kinds_are_captured_once_they_have_come_often_enough():
    calls: list[int] = []

    def counted(call: Callable[[], Outputs]) -> Recorded:
        calls.append(1)
        return Recorded(call)

    engine = new_engine("sd15")
    made = capturing(engine, counted)
    engine.generate([ask(1, steps=WORTH - 1)])
    assert not calls
    engine.generate([ask(1, steps=3)])
    engine.generate([ask(1, steps=9, sampler="euler_a", guidance_scale=3.0, negative_prompt="grey")])
    assert len(calls) == 1  # samplers, guidance and prompts are numbers in the same places
    assert (made.rows, made.padded) == (2 * (3 + 9), 0)
    engine.generate([ask(1, steps=4, width=96)])
    assert len(calls) == 2


CAPTURING, REPLAYING = "operation not permitted when stream is capturing", "run_func_ failed"


def fails(call: Callable[[], Outputs]) -> Recorded:
    raise RuntimeError(CAPTURING)


class Failing(Recorded):
    def replay(self) -> None:
        raise RuntimeError(REPLAYING)


@pytest.mark.parametrize(("record", "fault"), [(fails, CAPTURING), (Failing, REPLAYING)])
def test_what_cannot_be_captured_or_replayed_is_drawn_as_it_is(
    record: Record, fault: str, caplog: pytest.LogCaptureFixture
):
    [expected] = pictures(new_engine("sd15"), [ask(3)])
    engine = new_engine("sd15")
    made = capturing(engine, record)
    with caplog.at_level(logging.WARNING):
        [found] = pictures(engine, [ask(3)])
    assert (found == expected).all()
    assert not made.rows
    assert [told.getMessage() for told in caplog.records] == [
        f"forwards of 2 rows and this kind are made as they are: {fault}"
    ]


def test_what_was_captured_makes_room_before_batches_become_smaller(monkeypatch: pytest.MonkeyPatch):
    requests = [ask(seed, width=96) for seed in (2, 3)]
    expected = pictures(new_engine("sd15"), requests)
    engine = new_engine("sd15")
    made, rows = capturing(engine), []
    engine.generate([ask(1)])
    predict = type(engine.family).predict

    def crowded(family: object, latents: torch.Tensor, *given: object) -> torch.Tensor:
        if any(kind.place for kind in made._kinds.values()) and latents.shape[-1] == 12:
            raise torch.OutOfMemoryError("no room beside what is captured")
        rows.append(len(latents))
        return predict(family, latents, *given)

    monkeypatch.setattr(type(engine.family), "predict", crowded)
    for ours, theirs in zip(pictures(engine, requests), expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1
    assert set(rows) == {4}
    assert engine.batcher.cap((4, 8, 12)) == new_engine("sd15").batcher.cap((4, 8, 12))


def test_places_together_take_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(captured, "BYTES", 3 * captured.SIZES[0] * sum(t.nbytes for _, t in leaves(inputs_of(1))))
    made, inputs = Captured(zeros, lambda: Recorded), inputs_of(1)
    for side in (8, 7, 6, 5, 4):
        for _ in range(WORTH + 1):
            made(replace(inputs, history=inputs.history[..., :side]))
    places = [kind.place for kind in made._kinds.values() if kind.place is not None]
    assert 2 <= len(places) < 5
    assert sum(each.nbytes for each in places) <= captured.BYTES
    assert places[-1].tensors[".history"].shape[-1] == 4


def inputs_of(rows: int) -> Inputs:
    """Of a forward of an unguided picture, as if there were so many of it."""
    engine = new_engine("sd15")
    found: list[Inputs] = []

    def keeping(inputs: Inputs) -> Outputs:
        found.append(inputs)
        return forward(inputs, engine._denoiser._predict)

    engine._denoiser._plain = keeping
    engine.generate([ask(1, steps=2, guidance_scale=1.0)])
    return planted(found[0], {name: tensor.repeat_interleave(rows, 0) for name, tensor in leaves(found[0])})


def zeros(inputs: Inputs) -> Outputs:
    return Outputs(torch.zeros_like(inputs.history), torch.zeros_like(inputs.history[:, 0]))


def test_forwards_that_are_too_large_are_made_as_they_are(monkeypatch: pytest.MonkeyPatch):
    inputs = inputs_of(SIZES[-1] + 1)
    made = Captured(zeros, lambda: Recorded)
    for _ in range(2 * WORTH):
        made(inputs)
    assert not made.rows
    one = inputs_of(1)
    monkeypatch.setattr(captured, "BYTES", sum(tensor.nbytes for _, tensor in leaves(one)) - 1)
    for _ in range(2 * WORTH):
        made(one)
    assert not made.rows
    monkeypatch.setattr(captured, "BYTES", captured.BYTES + 1)
    for _ in range(2 * WORTH):
        made(one)
    assert made.rows == WORTH + 1


def test_only_so_many_kinds_are_remembered():
    made, inputs = Captured(zeros, lambda: Recorded), inputs_of(1)
    for side in range(1, KINDS + 10):
        for _ in range(WORTH):
            made(replace(inputs, history=inputs.history[..., :side].repeat(1, 1, 1, 1, 1 + side)))
    assert len(made._kinds) == KINDS


def test_leaves_and_planted_are_each_others_inverse():
    inputs = inputs_of(3)
    tensors = dict(leaves(inputs))
    assert ".rows.context" in tensors
    twice = planted(inputs, {name: 2 * tensor for name, tensor in tensors.items()})
    assert all(torch.equal(tensor, 2 * tensors[name]) for name, tensor in leaves(twice))


def test_graphs_want_a_gpu():
    with pytest.raises(InvalidRequest) as refused:
        place("cpu", "auto", graphs=True)
    assert refused.value.field == "graphs"


def test_more_loras_at_hand_than_rows_are_worn_as_they_are(monkeypatch: pytest.MonkeyPatch):
    """What is not gathered for each row stays in one place with all that others wore before."""
    monkeypatch.setattr(lora, "GATHERED_BYTES", 0)
    plain = mixed_engine()
    mixed = [
        ask(seed, steps=WORTH + 2, adapters=(AdapterUse(name="crescent", weight=weight),))
        for seed, weight in enumerate((0.5, 0.6, 0.7, 0.8))
    ]
    [expected] = pictures(plain, mixed[:1])
    engine = mixed_engine()
    made = capturing(engine)
    pictures(engine, mixed[:1])
    pictures(engine, mixed)
    [found] = pictures(engine, mixed[:1])
    assert made.rows
    assert np.abs(found - expected).max() <= 1
