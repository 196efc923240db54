"""A picture enlarged in overlapping tiles whose results fade into each other: bounded memory, no seams. No torch.

Next to a tile's inner edge a network lacks what lies beyond: that much is computed and thrown away. Where the network
looks no further than CONTEXT, the result is that of the whole picture in one piece.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CONTEXT = 16  # pixels thrown away at an inner edge: a 3x3 convolution looks one pixel further, so 16 of them in a row
FEATHER = 16  # pixels over which one tile fades into the next
OVERLAP = CONTEXT + FEATHER + CONTEXT

Network = Callable[[np.ndarray], np.ndarray]  # uint8 (h, w, 3) -> float32 (h * scale, w * scale, 3), 0 to 255
OnTile = Callable[[int, int], None]  # how many tiles of how many are done


@dataclass(frozen=True, eq=False)
class Span:
    """A tile along one axis: from `start` to `stop` in the picture, and what each of its enlarged pixels counts."""

    start: int
    stop: int
    weights: np.ndarray  # float32 ((stop - start) * scale,): 0 in the context, a ramp, 1 inside


def spans(length: int, tile: int, scale: int) -> list[Span]:
    """Tiles of at most `tile` pixels that cover `length`; at every pixel their weights add up to 1.

    Each overlaps the next by exactly OVERLAP, so `tile` has to be at least twice that.
    """
    starts = range(0, max(1, length - OVERLAP), tile - OVERLAP)
    return [_span(start, min(start + tile, length), length, scale) for start in starts]


def _span(start: int, stop: int, length: int, scale: int) -> Span:
    weights = np.ones((stop - start) * scale, np.float32)
    ramp = (np.arange(FEATHER * scale, dtype=np.float32) + 0.5) / (FEATHER * scale)
    fade_in = np.concatenate([np.zeros(CONTEXT * scale, np.float32), ramp])
    if start > 0:
        weights[: len(fade_in)] = fade_in
    if stop < length:
        weights[-len(fade_in) :] = fade_in[::-1]
    return Span(start, stop, weights)


def enlarge(pixels: np.ndarray, scale: int, tile: int, network: Network, on_tile: OnTile) -> np.ndarray:
    """uint8 (height, width, 3) to (height * scale, width * scale, 3), through `network` in tiles of `tile` pixels.

    Besides the result it holds one row of tiles in float32. `on_tile` is called before each tile and at the end; what
    it raises ends the work.
    """
    height, width, _ = pixels.shape
    rows, columns = spans(height, tile, scale), spans(width, tile, scale)
    total = len(rows) * len(columns)
    enlarged = np.empty((height * scale, width * scale, 3), np.uint8)
    band = np.zeros((min(tile, height) * scale, width * scale, 3), np.float32)  # what the present row has come to
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            on_tile(i * len(columns) + j, total)
            part = network(pixels[row.start : row.stop, column.start : column.stop])
            part *= row.weights[:, None, None] * column.weights[None, :, None]
            band[: len(part), column.start * scale : column.stop * scale] += part
        end = rows[i + 1].start if i + 1 < len(rows) else height
        done = (end - row.start) * scale  # lines that no later row of tiles adds to
        enlarged[row.start * scale : end * scale] = np.clip(np.rint(band[:done]), 0, 255)
        band[:-done] = band[done:]
        band[-done:] = 0
    on_tile(total, total)
    return enlarged
