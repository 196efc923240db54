"""An engine between keys: a flood does not hold up its neighbour, who draws the same picture as alone."""

import time
from typing import Any

import numpy as np
import torch

from models.decoder import Decoder
from models.delivery import Delivery
from models.engine import Engine
from models.events import Event, Finished, Progress
from models.request import GenerationRequest
from tests.models.conftest import drawn, loaded_family, new_engine

AREA = 16 * 16
STEPS = 6
BEFORE = 3  # forwards that the flood has had when another comes


def ask(**fields) -> GenerationRequest:
    fields = {"model": "sd15", "prompt": "a red circle", "steps": STEPS, "seed": 1, "sampler": "euler"} | fields
    return GenerationRequest(**fields)


def flooded(key: str) -> Engine:
    """An engine with more to do for a key than fits into a forward.

    Forwards take as long as on two cores, it is made to believe: 32 ms for a picture, 41 for two, 127 for twelve. What
    they take here it does not hear.
    """
    engine = new_engine("sd15")
    engine.batcher.set_cap((4, 16, 16), 24)
    seconds = {rows * AREA: 0.0234 + 0.0043 * rows for rows in (1, 2, 4, 8, 16, 24)}
    engine.pace.learn(seconds, usual=2 * AREA, full=24 * AREA)
    engine.pace.note = engine._denoiser._ahead._tell = lambda *took: None
    for seed in range(14):
        engine.submit(ask(seed=100 + seed, steps=30), lambda event: None, progress=False, key=key)
    for _ in range(BEFORE):
        engine.step()
    return engine


def test_a_light_key_steps_in_every_forward_and_none_of_them_is_broad():
    engine, events = flooded("flood"), list[Event]()
    engine.submit(ask(), events.append, key="light")
    while not any(isinstance(event, Finished) for event in events):
        engine.step()
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.forward for event in progress] == list(range(BEFORE + 1, BEFORE + 1 + STEPS))
    assert {event.rows for event in progress} == {4}  # its two, and two of the flood's, which goes on
    assert engine._live[0].step >= BEFORE + STEPS
    [[alone]] = new_engine("sd15").generate([ask()])
    [picture] = [event for event in events if isinstance(event, Finished)]
    assert np.abs(drawn(picture.data) - drawn(alone.data)).max() <= 1


def test_of_the_same_key_it_would_have_waited():
    engine, late = flooded("one"), list[Event]()
    engine.submit(ask(), late.append, key="one")
    for _ in range(4):
        engine.step()
    assert not late


class Picture:
    """One that waits to be decoded."""

    def __init__(self, key: str, denoised: float = 0.0, side: int = 16, batch: bool = False):
        self.key, self.denoised, self.shape = key, denoised, (4, side, side)
        self.urgency = batch, 0.0


def delivering() -> Delivery:
    decoder = Decoder(loaded_family("sd15").autoencoder, torch.device("cpu"))
    return Delivery(decoder, "r", 128 * 128, lambda *told: None)


def test_keys_take_turns_at_the_decoder():
    delivery = delivering()
    waiting: list[Any] = [Picture(key, denoised=n) for n, key in enumerate("aaaaaabbc")]
    delivery.queue = waiting
    assert ["".join(sequence.key for sequence in delivery.take()) for _ in range(3)] == ["abc", "ab", "aaaa"]
    delivery.close()


def test_keys_take_turns_at_the_decoder_also_where_sizes_differ():
    delivery = delivering()
    now = time.monotonic()
    waiting: list[Any] = [*(Picture("a", now - 9 + n / 100) for n in range(12)), Picture("b", now - 1, side=24)]
    delivery.queue = waiting
    assert ["".join(sequence.key for sequence in delivery.take()) for _ in range(3)] == ["a", "b", "aaaa"]
    delivery.close()


def test_whose_first_picture_has_waited_longest_is_decoded_first():
    delivery = delivering()
    waiting: list[Any] = [Picture(key, denoised, side=32) for key, denoised in (("a", 1.0), ("b", 1.5), ("a", 2.0))]
    delivery.queue = waiting
    assert delivery.take() == waiting[:1]
    delivery.close()


def test_batch_work_is_decoded_after_interactive_work():
    delivery = delivering()
    batch, own = Picture("b", 1.0, batch=True), [Picture("a", 2.0), Picture("a", 3.0)]
    waiting: list[Any] = [batch, *own]
    delivery.queue = waiting
    assert [delivery.take(), delivery.take()] == [own, [batch]]
    delivery.close()


def test_a_floods_pictures_are_decoded_one_at_a_time_while_another_key_steps():
    delivery = delivering()
    waiting: list[Any] = [Picture("a") for _ in range(6)]
    stepping: list[Any] = [Picture("a"), Picture("b")]
    delivery.queue = waiting
    taken = [delivery.take(stepping), delivery.take(stepping), delivery.take(stepping[:1])]
    assert [len(sequences) for sequences in taken] == [1, 1, 4]
    delivery.close()


class Busy(Decoder):
    """One that has something to do until it is waited for, as a GPU's has."""

    def __init__(self):
        super().__init__(loaded_family("sd15").autoencoder, torch.device("cpu"))
        self.working = True

    @property
    def busy(self) -> bool:
        return self.working

    def wait(self) -> None:
        self.working = False


def test_nothing_more_is_decoded_beside_what_still_is_but_steps_go_on():
    delivery = Delivery(Busy(), "r", 128 * 128, lambda *told: None)
    waiting: list[Any] = [Picture("a")]
    stepping: list[Any] = [Picture("a")]
    delivery.queue = list(waiting)
    assert delivery.take(stepping) == []
    assert delivery.take() == waiting  # where there are no steps to take, it is waited for
    delivery.close()
