"""Measuring what a forward costs by its rows, when an engine warms up."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch

from models.card import ModelCard
from models.denoiser import Denoiser
from models.errors import InvalidRequest
from models.measurements import Measurements, Seconds
from models.preparation import Preparation
from models.request import EffectiveRequest, warm_up_request
from models.turns import Shape

_ROW_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_ALWAYS_TRIED = 16  # rows: on a busy machine one slow forward would pass for the end of what pays
_TRIES = 5  # of which the best counts


def knee(seconds: Mapping[int, float], worth: float = 0.1) -> int:
    """The smallest row count whose rows per second come within `worth` of the best; a bigger batch only delays.

    `seconds` maps a row count to the seconds one forward of so many rows takes.
    """
    best = max(rows / time for rows, time in seconds.items())
    return min(rows for rows, time in seconds.items() if rows / time >= (1 - worth) * best)


def seconds_by_rows(forward_s: Callable[[int], float], most: int | None = None) -> Seconds:
    """Seconds of one forward by number of rows, up to `most`, or to where more no longer pay or memory ends.

    Raises OutOfMemoryError where that is before the first row.
    """
    seconds: Seconds = {}
    for rows in _ROW_COUNTS:
        if most and rows > most:
            break
        try:
            seconds[rows] = forward_s(rows)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if not seconds:
                raise
            break
        if not most and rows >= _ALWAYS_TRIED and rows > knee(seconds):
            break
    return seconds


def measured(
    preparation: Preparation, denoiser: Denoiser, measurements: Measurements, plain: EffectiveRequest
) -> tuple[Shape, Seconds]:
    """The latents' shape of such pictures, and the seconds of their forwards by rows, as far as they are measured."""
    [sequence] = preparation.sequences(plain, "", time.monotonic())
    measure = partial(forward_s, preparation, denoiser, plain)
    return sequence.shape, measurements.of(sequence.shape, partial(seconds_by_rows, measure))


def plainest(card: ModelCard, sizes: Iterable[tuple[int, int]]) -> list[EffectiveRequest]:
    """An unguided picture of the native size and one of each of these, all of whose steps are of the whole network.

    Raises InvalidRequest for a size that the model does not draw.
    """
    plain = warm_up_request(card, guidance_scale=1.0, steps=_TRIES, deep_cache=1)
    requests = [plain.resolve(card)]
    for number, (width, height) in enumerate(sizes):
        try:
            requests.append(replace(plain, width=width, height=height).resolve(card))
        except InvalidRequest as refused:
            raise InvalidRequest(f"sizes.{number}", str(refused)) from refused
    return requests


def forward_s(preparation: Preparation, denoiser: Denoiser, plain: EffectiveRequest, rows: int) -> float:
    """Seconds that a step of `rows` pictures of the plainest kind takes, the best of a few."""
    sequences = [preparation.sequences(plain, "", time.monotonic())[0] for _ in range(rows)]
    preparation.join(sequences)
    seconds = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        denoiser.step(sequences).sum().item()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
