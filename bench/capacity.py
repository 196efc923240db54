"""Capacity: the highest arrival rate at which a server still finishes 95 % of requests in time."""

from collections.abc import Awaitable, Callable

COARSE = 1.25  # between neighbouring rates of the first search
MOST_TRIALS = 8


async def search(passes: Callable[[float], Awaitable[bool]], guess: float, refinements: int = 1) -> float:
    """The highest rate that passed, within COARSE ** (1 / 2 ** refinements) of one that failed.

    Walks from the guess up or down by COARSE until the answer changes, then halves the bracket `refinements` times.
    A search that finds no rate that passes within MOST_TRIALS gives 0.
    """
    low, high = 0.0, 0.0
    rate = guess
    for _ in range(MOST_TRIALS):
        if await passes(rate):
            low = rate
        else:
            high = rate
        if low and high:
            break
        rate = rate * COARSE if low else rate / COARSE
    for _ in range(refinements if low and high else 0):
        middle = (low * high) ** 0.5
        if await passes(middle):
            low = middle
        else:
            high = middle
    return low


def highest(passes: Callable[[float], bool], low: float, high: float, precision: float = 0.01) -> float:
    """The same by plain bisection, for servers that are computed and not run: trials cost nothing. 0 if `low` fails."""
    if not passes(low):
        return 0.0
    while high / low > 1 + precision:
        middle = (low * high) ** 0.5
        if passes(middle):
            low = middle
        else:
            high = middle
    return low
