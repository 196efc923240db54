"""Drift: how far a contender's final latents lie from those computed in float32 with the same weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions in float32 are TF32 on a GPU unless one says otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def recorded_latents(vae: Any) -> Iterator[list[torch.Tensor]]:
    """The latents (c, h, w) of every picture decoded meanwhile, as the VAE gets them, in whatever order."""
    found: list[torch.Tensor] = []
    decode = vae.decode

    def recording(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.extend((latents * vae.config.scaling_factor).float().cpu())
        return decode(latents, *args, **kwargs)

    vae.decode = recording
    try:
        yield found
    finally:
        del vae.decode


def nearest(reference: torch.Tensor, found: Sequence[torch.Tensor]) -> float:
    """The smallest relative L2 distance from the reference: of all pictures drawn, its own is the one near to it."""
    return min(((latents - reference).norm() / reference.norm()).item() for latents in found)
