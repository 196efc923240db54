"""Attention: torch's kernels for it beside each other, at the shapes that a model's UNet calls it with."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from bench.built import Built
from bench.ceilings import best_s
from bench.fullsize import forward_on_meta
from bench.load import Say
from bench.pages import Keep, Piece
from bench.report import NOTHING, Sheet

ROWS = (2, 16)
OWN = "torch's own choice"
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LEGEND = (
    "Attention alone, of random numbers: milliseconds for all the calls of one forward, each shape timed by itself. "
    "Heliograph and diffusers both leave it to torch's own choice."
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One row's attention, as often as a forward has it: `heads` of `width`, from so many positions to so many told."""

    heads: int
    width: int
    positions: int
    told: int
    times: int


@dataclass(kw_only=True)
class Kernel:
    """One way to compute it. `seconds` of one forward's calls by rows; `missing` says why there are none."""

    name: str
    seconds: dict[int, float] = field(default_factory=dict)
    missing: str = ""


class _Heard(TorchFunctionMode):
    """Counts the shapes that attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, int, int, int]] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            query, key = args[:2]
            self.counts[query.shape[1], query.shape[3], query.shape[2], key.shape[2]] += 1
        return function(*args, **(kwargs or {}))


def shapes(unet: Any, side: int) -> list[Shape]:
    """Those of one row's forward at pictures of this side."""
    with _Heard() as heard:
        forward_on_meta(unet, side)
    return [
        Shape(heads=heads, width=width, positions=positions, told=told, times=times)
        for (heads, width, positions, told), times in heard.counts.items()
    ]


def compare(built: Built, say: Say, keep: Keep) -> None:
    """Every kernel that there is here."""
    every = shapes(built.modules["unet"], built.side)
    kernels = [Kernel(name=name) for name in (OWN, *BACKENDS, *list_flash_attention_impls())]
    for number, kernel in enumerate(kernels):
        say(f"attention by {kernel.name}", number, len(kernels))
        try:
            with _chosen(kernel.name):
                kernel.seconds = {rows: sum(_seconds(built, each, rows) for each in every) for rows in ROWS}
        except Exception as fault:  # not built in, not for this device, not for these shapes
            kernel.missing = repr(fault)
    missing = [f"Not there: {each.name} ({each.missing})." for each in kernels if each.missing]
    found = {"shapes": every, "kernels": kernels}
    keep(Piece.of("attention", built, [_sheet(built, kernels)], [LEGEND, *missing], found))


@contextmanager
def _chosen(name: str) -> Iterator[None]:
    """While it lasts attention is computed by this kernel or not at all."""
    if name == OWN:
        yield
    elif name in BACKENDS:
        with sdpa_kernel(BACKENDS[name]):
            yield
    else:
        activate_flash_attention_impl(name)
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                yield
        finally:
            restore_flash_attention_impl()


def _seconds(built: Built, shape: Shape, rows: int) -> float:
    device, dtype = built.placement.device, built.placement.dtype
    counts = (shape.positions, shape.told, shape.told)
    query, key, value = (
        torch.randn(rows, n, shape.heads, shape.width, device=device).to(dtype).transpose(1, 2) for n in counts
    )
    return shape.times * best_s(lambda: scaled_dot_product_attention(query, key, value), device)


def _sheet(built: Built, kernels: Sequence[Kernel]) -> Sheet:
    name = built.network.name
    return Sheet(
        title=f"{name} at {built.side} px, attention by kernel",
        columns=(name, *(f"{rows} rows, ms" for rows in ROWS)),
        rows=[
            [each.name, *(f"{1e3 * each.seconds[rows]:.3g}" if each.seconds else NOTHING for rows in ROWS)]
            for each in kernels
        ],
    )
