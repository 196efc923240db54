"""An engine between keys: a flood does not hold up its neighbour, who draws the same picture as alone."""

import numpy as np

from models.engine import Engine
from models.events import Finished, Progress
from models.request import GenerationRequest
from tests.models.conftest import drawn, new_engine

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
    engine.close()
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


def test_a_finished_picture_is_decoded_before_the_rest_of_anothers():
    engine = on_a_processor()
    finished: list[str] = []

    def told(key: str):
        return lambda event: finished.append(key) if isinstance(event, Finished) else None

    for seed in range(10):
        engine.submit(ask(seed=seed, steps=1), told("flood"), progress=False, key="flood")
    while engine._live:
        engine.step()
    waiting = len(engine._delivery.queue)
    engine.submit(ask(steps=1), told("light"), progress=False, key="light")
    assert waiting > 4
    while engine.step():
        pass
    engine.close()
    assert "light" in finished[-waiting:-1]
    assert finished[-1] == "flood"
