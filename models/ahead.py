"""How far the host may be ahead of a GPU, which does what is queued for it whenever it gets there."""

from collections import deque

import torch

STEPS = 1  # that may be unfinished when the next one is prepared: the GPU has work meanwhile


class Ahead:
    """Called after each step is queued, waits until no more than STEPS are unfinished, this one among them.

    Without it a picture's steps would be queued as fast as they can be, and nobody could join them, leave them or take
    turns with them. On a device that is no CUDA GPU it does nothing.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._queued: deque[torch.cuda.Event] = deque()

    def __call__(self) -> None:
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._queued.append(event)
        while len(self._queued) > STEPS:
            self._queued.popleft().synchronize()
