"""The autoencoder between pictures and latents, and a linear shortcut from latents to small previews."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from models.errors import GenerationFailed
from models.images import Picture

_FIT_SIDE = 128  # pixels of the pictures that the preview map is fitted on
_FIT_PICTURES = 8


class Autoencoder:
    """diffusers' AutoencoderKL with SD's conventions: scaled latents (n, c, h, w), 8-bit pictures (n, H, W, 3)."""

    def __init__(self, vae: Any, device: torch.device):
        self._vae = vae  # Any, as the networks in families/: diffusers types its configurations as plain dicts
        self._device = device
        self._mean, self._scale = _normalisation(vae, device)
        self.channels: int = vae.config.latent_channels
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self._preview_map = self._fit_preview()

    @torch.inference_mode()
    def encode(
        self,
        pictures: Sequence[Picture],
        generators: Sequence[torch.Generator],
        masks: Sequence[np.ndarray] | None = None,
    ) -> list[torch.Tensor]:
        """Scaled latents (c, h, w) of pictures of one size, each sampled from its posterior by its own generator.

        What is white in `masks` (uint8 (H, W) each) is hidden behind mid grey, as inpainting networks expect it.
        """
        pixels = torch.from_numpy(np.stack([p.array() for p in pictures])).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        if masks is not None:
            pixels = pixels * torch.from_numpy(np.stack(masks) < 128)[:, None]
        posterior = self._vae.encode(pixels.to(self._device, self._vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators]).to(self._device)
        return list(((mean + std * noise) - self._mean) * self._scale)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (n, 3, H, W) in 0..1, float32, on the device; NaN where the latents were."""
        pixels = self._vae.decode((latents / self._scale + self._mean).to(self._vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    @torch.inference_mode()
    def preview(self, latents: torch.Tensor) -> np.ndarray:
        """A rough picture, uint8 (h, w, 3), of latents (c, h, w): one pixel for each latent position."""
        weight, bias = self._preview_map
        rgb = torch.einsum("oc,chw->hwo", weight, latents.float()) + bias
        return (rgb.clamp(0, 1) * 255).round().byte().cpu().numpy()

    @torch.inference_mode()
    def _fit_preview(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Least squares from latents to mean colours, over smooth random pictures that this VAE encodes itself."""
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (_FIT_PICTURES, 4, 4, 3), dtype=np.uint8)
        pictures = [Picture.from_array(c).resized(_FIT_SIDE, _FIT_SIDE) for c in coarse]
        generators = [torch.Generator().manual_seed(0) for _ in pictures]
        latents = torch.stack(self.encode(pictures, generators))
        side = _FIT_SIDE // self.factor
        pixels = torch.from_numpy(np.stack([p.array() for p in pictures])).float() / 255
        colours = pixels.reshape(-1, side, self.factor, side, self.factor, 3).mean((2, 4)).reshape(-1, 3)
        inputs = latents.permute(0, 2, 3, 1).reshape(-1, self.channels).cpu()
        solution = torch.linalg.lstsq(torch.cat([inputs, torch.ones(len(inputs), 1)], 1), colours).solution
        return solution[:-1].T.to(self._device), solution[-1].to(self._device)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """A decoded picture (3, H, W) in 0..1 as uint8 (H, W, 3). Raises GenerationFailed where it is not finite."""
    if not np.isfinite(pixels).all():
        raise GenerationFailed("nan_latents", "the network's output was not finite; another dtype may help")
    return (pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8)


def _normalisation(vae: Any, device: torch.device) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """(mean, scale): latents handed out are (raw - mean) * scale; some SDXL autoencoders have them per channel."""
    scale = vae.config.scaling_factor
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return 0.0, scale
    shape = (1, -1, 1, 1)
    return torch.tensor(mean, device=device).view(shape), scale / torch.tensor(std, device=device).view(shape)
