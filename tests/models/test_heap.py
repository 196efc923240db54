"""Memory that was freed goes back to the system, also from between what lives on."""

import numpy as np
import psutil
import pytest

from models import delivery, heap
from tests.models.test_engine import ask, step_until

BLOCK = 64 * 2**10  # below what glibc maps apart
BLOCKS = 2000


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(heap._trim is None, reason="the C library has no malloc_trim")
def test_what_lies_between_living_blocks_is_given_back():
    blocks = [np.ones(BLOCK, np.uint8) for _ in range(2 * BLOCKS)]
    alive = blocks[1::2]
    del blocks
    before = resident()
    heap.give_back()
    assert before - resident() > BLOCK * BLOCKS / 2
    assert all(block[0] == 1 for block in alive)


def test_an_engine_does_so_now_and_then(engine, monkeypatch: pytest.MonkeyPatch):
    tidied = []
    monkeypatch.setattr(heap, "give_back", lambda: tidied.append(True))
    monkeypatch.setattr(delivery, "_TIDY_S", 1e9)
    engine.generate([ask(steps=2)])
    assert not tidied
    monkeypatch.setattr(delivery, "_TIDY_S", 0)
    engine.generate([ask(steps=2, seed=seed) for seed in range(2)])
    step_until(engine, lambda: tidied)
