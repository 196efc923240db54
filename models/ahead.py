"""How far the host may be ahead of a GPU, which does what is queued for it whenever it gets there."""

from collections import deque

import torch

STEPS = 1  # queued while another one runs: the GPU never waits for the host, and a newcomer not for many steps


class Ahead:
    """Called after each step is queued, waits until no more than STEPS follow the one that runs.

    Without it a whole picture's steps would be queued at once: nobody could join them, leave them or take turns with
    them any more, and what a step takes could not be told. On a device that has no queue it does nothing.
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
