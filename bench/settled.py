"""An engine made ready to be measured: whatever breadth of forward may come has run, is captured, and is compiled."""

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from bench.contender import ROWS
from models.captured import LASTING, SIZES, WORTH
from models.engine import Engine
from models.request import GenerationRequest
from models.turns import JOINING

POLL_S = 0.2


def settle(engine: Engine, requests: Sequence[GenerationRequest], most: int) -> None:
    """Returns when nothing is being compiled any more. `requests` has one of each size in pixels; no more than `most`
    pictures ever share a forward."""
    captured = engine.captured
    if captured is None:
        _draw_all(engine, requests, most, 1)
        return
    compiling = engine.family.placement.compiled is not None
    _draw_all(engine, requests, most, LASTING if compiling else WORTH)
    while not captured.settled():
        time.sleep(POLL_S)
    if compiling:
        _draw_all(engine, requests, most, 1)  # from now on by what was compiled


def _draw_all(engine: Engine, requests: Sequence[GenerationRequest], most: int, forwards: int) -> None:
    """Has every breadth of forward come so often at least."""
    for request in requests:
        assert request.width, "a request that says everything"
        assert request.height, "a request that says everything"
        rows = engine.batcher.cap((4, request.height // 8, request.width // 8))
        for pictures in breadths(min(most, max(1, rows // ROWS))):
            steps = forwards + (pictures - 1) // JOINING  # they join a few at a time
            steps *= request.deep_cache or 1  # of which one in so many is of the whole network
            engine.generate([replace(request, seed=seed, steps=max(2, steps)) for seed in range(pictures)])


def breadths(most: int) -> list[int]:
    """Numbers of pictures up to `most`, one for each of the sizes that their rows are rounded up to."""
    sizes = {bisect_left(SIZES, ROWS * pictures): pictures for pictures in range(1, most + 1)}
    return sorted(sizes.values())
