"""On a CPU the rows of a forward are shared out among threads."""

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

LEAST = 2048  # latent pixels a thread must get: with fewer, Python's lock costs more than is won (measured, sd15)
EVEN = 0.9  # the share of the threads' time that must be used where the rows do not divide evenly
_part: contextvars.ContextVar[slice] = contextvars.ContextVar("part", default=slice(None))


def part() -> slice:
    """Which of the batch's rows the network is being called with, for whatever acts row by row inside it."""
    return _part.get()


class RowThreads:
    """Calls a network for many rows; where that is faster, each thread with rows of its own.

    OpenMP shares out every single operation, so its threads wait for each other some hundred times in a forward, and
    what takes one core away for a moment stops all of them. Threads with rows of their own wait once.
    """

    def __init__(self, device: torch.device, threads: int):
        self._threads = threads if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    def __call__(
        self, forward: Callable[[slice], tuple[torch.Tensor, ...]], latents: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """What `forward` answers for a part of the rows, for all of `latents` (rows, c, h, w), in their order."""
        parts = self._parts(latents)
        if len(parts) == 1:
            return forward(parts[0])
        torch.set_num_threads(1)  # of this thread, and of MKL's in all: OpenMP teams would stand in each other's way
        others = [self._started().submit(_call, forward, part) for part in parts[1:]]
        try:
            answers = [_call(forward, parts[0]), *(other.result() for other in others)]
        finally:
            wait(others)  # also when one has failed: what comes next must have the cores to itself
            torch.set_num_threads(self._threads)
        return tuple(torch.cat(pieces) for pieces in zip(*answers, strict=True))

    def _parts(self, latents: torch.Tensor) -> list[slice]:
        rows, (height, width) = len(latents), latents.shape[-2:]
        most = -(-rows // self._threads)
        enough = rows * height * width >= LEAST * self._threads and rows >= EVEN * most * self._threads
        if self._threads == 1 or not enough:
            return [slice(0, rows)]
        return [slice(first, min(first + most, rows)) for first in range(0, rows, most)]

    def _started(self) -> ThreadPoolExecutor:
        # One core each; the thread that calls takes the first part.
        self._pool = self._pool or ThreadPoolExecutor(
            self._threads - 1, "rows", initializer=torch.set_num_threads, initargs=(1,)
        )
        return self._pool


def _call(forward: Callable[[slice], tuple[torch.Tensor, ...]], rows: slice) -> tuple[torch.Tensor, ...]:
    token = _part.set(rows)
    try:
        with torch.inference_mode():
            return forward(rows)
    finally:
        _part.reset(token)
