"""Open loop: a contender's capacity by real trials, all of them with the same requests and deadlines."""

from collections.abc import Awaitable, Callable

from bench.capacity import search
from bench.load import Run
from bench.results import Capacity, OpenLoop

PATIENCE = 3.0  # a request is in time within so many times its isolated latency
Trial = Callable[[float], Awaitable[Run]]


async def searched(
    trial: Trial, guess: float, refinements: int, note: str = "", fits: Callable[[float], bool] = lambda rate: True
) -> Capacity:
    """The capacity found from a guess (bench.capacity). `fits` says whether there is time for a trial at a rate; where
    there is none the search ends with the best that has passed."""
    trials: list[OpenLoop] = []
    passed = 0.0

    async def passes(rate: float) -> bool:
        nonlocal passed
        if not fits(rate):
            raise TimeoutError(f"no time for a trial at {rate:.2f} a second")
        run = await trial(rate)
        trials.append(OpenLoop.of(rate, run))
        passed = max(passed, rate) if run.passed else passed
        return run.passed

    try:
        rate = await search(passes, guess, refinements)
    except TimeoutError as cut:
        return Capacity(rate=passed, trials=tuple(trials), note=", ".join(filter(None, (note, str(cut)))), cut=True)
    return Capacity(rate=rate, trials=tuple(trials), note=note)
