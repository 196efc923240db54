"""Pictures enlarged: by Lanczos, or by a network of the ESRGAN family, whatever their size and with their alpha."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from models import esrgan, tiles
from models.alpha import Layers
from models.errors import Cancelled, GenerationFailed, InvalidRequest
from models.parts import Upscale
from models.upscaler_card import LANCZOS, UpscalerCard
from models.weights import check_safetensors, place

TILE_MULTIPLE = 8  # tiles then begin where architectures that work on blocks of pixels begin a block


@dataclass(frozen=True, eq=False)
class Network:
    """A network that enlarges `scale` times: (1, 3, h, w) in 0 to 1 to (1, 3, h * scale, w * scale).

    `dtypes` are those it can run in besides float32; one that is `whole` sees the picture in one piece.
    """

    forward: Callable[[Tensor], Tensor]
    module: torch.nn.Module
    scale: int
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    whole: bool = False


class Upscaler:
    """The upscalers of a card. Every checkpoint is loaded at once.

    `sources` has a `.safetensors` file for every name but `lanczos`. `tile` is the largest piece, in pixels a side,
    that a network sees at once. Threads may share an Upscaler. Raises InvalidRequest where a file is none.
    """

    def __init__(
        self,
        card: UpscalerCard,
        sources: Mapping[str, str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        tile: int = 256,
    ):
        if tile < 2 * tiles.OVERLAP or tile % TILE_MULTIPLE:
            raise InvalidRequest(
                "tile", f"must be a multiple of {TILE_MULTIPLE} from {2 * tiles.OVERLAP} up, not {tile}"
            )
        self.card, self._tile = card, tile
        # bfloat16, which `auto` means on a GPU, is coarser than the 256 levels of a pixel.
        self._chosen = dtype != "auto"
        self._placement = place(device, dtype if self._chosen else "float32")
        self._networks = {name: self._placed(load(Path(source))) for name, source in sources.items()}

    def upscale(
        self,
        encoded: bytes,
        wanted: Upscale,
        *,
        on_tile: tiles.OnTile = lambda done, total: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Layers:
        """The encoded picture, `wanted.scale` times as large, each side rounded.

        A network enlarges once, by its own factor; Lanczos makes up for the difference. Alpha goes through Lanczos.
        Raises InvalidRequest (no picture, too large, a scale out of range), NotFound, Cancelled, and GenerationFailed
        where the network's output is not finite or memory runs out.
        """
        wanted = self.card.resolve(wanted)
        self.card.check(encoded, wanted.scale)
        picture = Layers.read(encoded)
        size = self.card.enlarged(*picture.size, wanted.scale)
        if wanted.model == LANCZOS:
            on_tile(0, 1)
            colour = picture.colour
        else:
            network = self._networks[str(wanted.model)]
            self.card.enlarged(*picture.size, network.scale)  # what it is on the way has to fit as well
            colour = self._through(network, picture.colour, on_tile, cancelled)
        alpha = None if picture.alpha is None else _resized(picture.alpha, size)
        return Layers(_resized(colour, size), alpha)

    def _through(
        self, network: Network, colour: np.ndarray, on_tile: tiles.OnTile, cancelled: Callable[[], bool]
    ) -> np.ndarray:
        def between(done: int, total: int) -> None:
            if cancelled():
                raise Cancelled("the enlargement was cancelled")
            on_tile(done, total)

        tile = max(self._tile, *colour.shape) if network.whole else self._tile
        try:
            return tiles.enlarge(colour, network.scale, tile, partial(_draw, network, self._placement.device), between)
        except torch.OutOfMemoryError as full:
            raise GenerationFailed("out_of_memory", "memory ran out; a smaller `tile` needs less") from full

    def _placed(self, network: Network) -> Network:
        network.module.to(self._placement.device, self._dtype(network)).eval().requires_grad_(False)
        return network

    def _dtype(self, network: Network) -> torch.dtype:
        """float16 on a GPU where the network can, unless a precision was chosen, which it then has to be able to."""
        if not self._chosen and self._placement.device.type == "cuda" and torch.float16 in network.dtypes:
            return torch.float16
        if self._placement.dtype not in (torch.float32, *network.dtypes):
            raise InvalidRequest("dtype", f"an upscaler cannot run in {self._placement.dtype}; use auto or float32")
        return self._placement.dtype


def load(source: Path) -> Network:
    """The network of a checkpoint, in float32 on the CPU. Raises InvalidRequest for what is no RGB upscaler."""
    check_safetensors(source)
    tensors = load_file(source)
    try:
        own = esrgan.build(tensors)
        network = _by_spandrel(source, tensors) if own is None else Network(own, own, own.scale)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AssertionError) as damaged:
        raise InvalidRequest("location", f"{source} cannot be loaded: {damaged}") from damaged
    if network.scale < 2:
        raise InvalidRequest("location", f"{source} does not enlarge: its factor is {network.scale}")
    return network


def _by_spandrel(source: Path, tensors: dict[str, Tensor]) -> Network:
    """Any other architecture of spandrel's main registry, which tells it from the tensors as well."""
    try:
        spandrel = importlib.import_module("spandrel")
    except ImportError as absent:
        needed = "other architectures need the package spandrel: pip install 'heliograph[upscalers]'"
        raise InvalidRequest("location", f"{source} is neither an ESRGAN nor a Compact network; {needed}") from absent
    try:
        found = spandrel.MAIN_REGISTRY.load(tensors)
    except spandrel.UnsupportedModelError as unknown:
        raise InvalidRequest("location", f"{source} has none of the architectures that spandrel knows") from unknown
    if not isinstance(found, spandrel.ImageModelDescriptor) or (found.input_channels, found.output_channels) != (3, 3):
        raise InvalidRequest("location", f"{source} is {found.architecture.name}; an upscaler takes and gives RGB")
    able = {torch.float16: found.supports_half, torch.bfloat16: found.supports_bfloat16}
    return Network(
        found,
        found.model,
        found.scale,
        dtypes=tuple(dtype for dtype, can in able.items() if can),
        whole=found.tiling is spandrel.ModelTiling.INTERNAL,
    )


def _draw(network: Network, device: torch.device, pixels: np.ndarray) -> np.ndarray:
    """One tile: uint8 (h, w, 3) to float32 (h * scale, w * scale, 3)."""
    dtype = next(network.module.parameters()).dtype
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        y = network.forward(x.to(device, dtype))[0].float()
    if not torch.isfinite(y).all():
        raise GenerationFailed("nan_latents", "the upscaler's output was not finite; another dtype may help")
    return (y.permute(1, 2, 0) * 255).cpu().contiguous().numpy()


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w) or (h, w, 3) at `size`, (width, height), by Lanczos."""
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.LANCZOS))
