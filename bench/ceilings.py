"""Ceilings: what this device can do at best, measured before anything is compared with it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CUBE = {"cuda": 8192, "cpu": 1024}
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**27}
REPEATS = 20


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Operations per second of a large product in the dtype that the networks run in, and bytes copied per second."""

    dtype: str
    cube: int
    flop_per_s: float
    bytes_per_s: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Ceilings":
        """On random data: zeros take less power, and then the clock is higher than in earnest."""
        n = CUBE[device.type]
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product_s = best_s(lambda: a @ b, device)
        source = torch.randn(COPIED_BYTES[device.type] // 4, device=device)
        target = torch.empty_like(source)
        copy_s = best_s(lambda: target.copy_(source), device)
        read_and_written = 2 * source.numel() * source.element_size()
        return cls(dtype=str(dtype), cube=n, flop_per_s=2 * n**3 / product_s, bytes_per_s=read_and_written / copy_s)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_s(call: Callable[[], object], device: torch.device) -> float:
    """The best mean over a few rounds: a single call would measure the launch."""
    rounds = []
    for _ in range(3):
        call()
        synchronise(device)
        start = time.perf_counter()
        for _ in range(REPEATS):
            call()
        synchronise(device)
        rounds.append((time.perf_counter() - start) / REPEATS)
    return min(rounds)
