"""An engine between keys: a flood does not hold up its neighbour, who draws the same picture as alone."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from models.delivery import Delivery
from models.engine import Engine
from models.events import Finished, Progress
from models.request import GenerationRequest
from tests.models.conftest import drawn, loaded_family, new_engine

AREA = 16 * 16
STEPS = 8


def ask(**fields) -> GenerationRequest:
    fields = {"model": "sd15", "prompt": "a red circle", "steps": STEPS, "seed": 1, "sampler": "euler"} | fields
    return GenerationRequest(**fields)


def on_a_processor() -> Engine:
    """Forwards take as long as on two cores, it is made to believe: 32 ms for a picture, 41 for two, 127 for twelve."""
    engine = new_engine("sd15")
    engine.batcher.set_cap((4, 16, 16), 24)
    seconds = {rows * AREA: 0.0234 + 0.0043 * rows for rows in (1, 2, 4, 8, 16, 24)}
    engine.pace.learn(seconds, usual=2 * AREA, full=24 * AREA)
    return engine


def flooded(engine: Engine, key: str, requests: int = 30) -> list[Finished]:
    finished: list[Finished] = []

    def on_event(event) -> None:
        if isinstance(event, Finished):
            finished.append(event)

    for seed in range(requests):
        engine.submit(ask(seed=100 + seed), on_event, progress=False, key=key)
    return finished


def test_a_light_key_steps_in_every_forward_and_none_of_them_is_broad():
    engine, light = on_a_processor(), []
    others = flooded(engine, "flood")
    for _ in range(3):
        engine.step()
    engine.submit(ask(), light.append, key="light")
    while not any(isinstance(event, Finished) for event in light):
        engine.step()
    progress = [event for event in light if isinstance(event, Progress)]
    assert [event.forward for event in progress] == list(range(4, 4 + STEPS))
    assert {event.rows for event in progress} == {4}  # its two, and two of the flood's, which goes on
    while engine.step():
        pass
    engine.close(drain_s=30)
    assert len(others) == 30
    [[alone]] = new_engine("sd15").generate([ask()])
    assert np.abs(drawn(light[-1].data) - drawn(alone.data)).max() <= 1


def test_of_the_same_key_it_would_have_waited():
    engine, late = on_a_processor(), []
    flooded(engine, "one")
    for _ in range(3):
        engine.step()
    engine.submit(ask(), late.append, key="one")
    for _ in range(STEPS):
        engine.step()
    assert not late


def test_keys_take_turns_at_the_decoder():
    delivery = Delivery(loaded_family("sd15").autoencoder, "r", 128 * 128, lambda *told: None)
    queue: list[Any] = [SimpleNamespace(key=key, shape=(4, 16, 16)) for key in "aaaaaabbc"]
    delivery.queue = queue
    assert ["".join(sequence.key for sequence in delivery.take()) for _ in range(3)] == ["abca", "abaa", "a"]
    delivery.close()
