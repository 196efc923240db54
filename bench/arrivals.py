"""Arrivals: when an open-loop client sends, decided before the run and never by the server. No torch, no ray."""

import random
from collections.abc import Sequence


def poisson(count: int, seed: int) -> list[float]:
    """Arrival times of a Poisson process of one arrival a second; the first comes after a gap like the others.

    Every contender and every rate gets the same gaps, only stretched: differences between trials are then the
    server's and not the draw's.
    """
    rng = random.Random(seed)
    now, times = 0.0, []
    for _ in range(count):
        now += rng.expovariate(1.0)
        times.append(now)
    return times


def at_rate(times: Sequence[float], rate: float) -> list[float]:
    """The same arrivals at `rate` per second."""
    return [time / rate for time in times]
