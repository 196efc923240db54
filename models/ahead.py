"""How far the host may be ahead of a GPU, which does what is queued for it whenever it gets there; and its steps' time.

Without a bound a picture's steps would be queued as fast as they can be, and nobody could join them, leave them or take
turns with them.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

STEPS = 1  # that may be unfinished when the next one is prepared: the GPU has work meanwhile

Tell = Callable[[float, float, bool], None]


class Ahead:
    """`tell` hears of each step how broad it was, how many seconds it took, and whether it was shallow, as soon as that
    is known."""

    def __init__(self, device: torch.device, tell: Tell):
        self._device = device
        self._tell = tell
        self._queued: deque[tuple[float, bool, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def step(self, breadth: float, shallow: bool) -> Iterator[None]:
        """While it lasts a step is queued; then it waits until no more than STEPS are unfinished, this one among them.

        On a device that is no CUDA GPU a step is finished when it has been made.
        """
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._tell(breadth, time.perf_counter() - started, shallow)
            return
        began = self._event()
        yield
        self._queued.append((breadth, shallow, began, self._event()))
        while len(self._queued) > STEPS:
            breadth, shallow, began, ended = self._queued.popleft()
            ended.synchronize()
            self._tell(breadth, began.elapsed_time(ended) / 1000, shallow)

    def _event(self) -> torch.cuda.Event:
        """Passed when the GPU gets there, which may be later than now."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
