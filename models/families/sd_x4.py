"""Stable Diffusion's x4 upscaler: a UNet that sees the small picture itself, with noise on it, beside its latents.

Source: the upscaler of Stable Diffusion 2 (arXiv:2112.10752, 4.4), as diffusers' StableDiffusionUpscalePipeline runs
it. Its autoencoder's factor is 4, so that a latent position lies on each pixel of the picture; the UNet is told the
level of the picture's noise as a class (noise conditioning augmentation, arXiv:2106.15282).
"""

from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention import BasicTransformerBlock

from models.errors import InvalidRequest
from models.family import Conditioning, Residuals, run_unet
from models.images import Picture
from models.limits import NOISE_LEVEL
from models.one_encoder import COMPONENTS, OneEncoder
from models.upscaling import UPSCALING
from models.weights import Components, Placement, Source
from models.weights import load as load_weights

_SCALING_FACTOR = 0.08333  # of the published autoencoder; files from before diffusers had it there do not say it
_COLOURS = 3


def load(source: Source, placement: Placement) -> "SDx4":
    components = load_weights(source, COMPONENTS | {"low_res_scheduler": DDPMScheduler}, placement)
    components.modules["vae"].register_to_config(scaling_factor=_SCALING_FACTOR)
    return SDx4(components, placement)


class SDx4(OneEncoder):
    """The x4 upscaler with weights; see models.family.UpscalingFamily. Raises InvalidRequest for another UNet."""

    scale = UPSCALING["sd_x4"].scale

    def __init__(self, components: Components, placement: Placement):
        super().__init__(components, placement)
        self.multiple = self.least = self.autoencoder.factor
        self._noising: Any = components.modules["low_res_scheduler"]
        config = self._unet.config
        wanted = self.autoencoder.channels + _COLOURS
        levels = min(config.num_class_embeds or 0, self._noising.config.num_train_timesteps)
        if (config.in_channels, self.autoencoder.factor) != (wanted, self.scale) or levels <= NOISE_LEVEL.high:
            raise InvalidRequest(
                "source",
                f"no x4 upscaler: its UNet takes {wanted} channels and knows {NOISE_LEVEL.high:.0f} levels of noise, "
                f"and its autoencoder's factor is {self.scale}",
            )
        for block in self._unet.modules():
            if isinstance(block, BasicTransformerBlock) and block.only_cross_attention:
                block.register_forward_pre_hook(_masked, with_kwargs=True)

    def shown(self, picture: Picture, noise_level: int, generator: torch.Generator) -> torch.Tensor:
        """The picture with noise on it and, as one more channel, the noise's level, which `predict` takes off again."""
        pixels = torch.from_numpy(picture.array().copy()).permute(2, 0, 1).float() / 255 * 2 - 1
        noise = torch.randn(pixels.shape, generator=generator)
        noisy = self._noising.add_noise(pixels, noise, torch.tensor([noise_level]))
        return torch.cat([noisy, torch.full_like(noisy[:1], noise_level)]).to(self.device)

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        rows: Conditioning,
        residuals: Residuals | None = None,
    ) -> torch.Tensor:
        levels = latents[:, -1, 0, 0].long()
        return run_unet(self._unet, latents[:, :-1], timesteps, rows, residuals, class_labels=levels)


def _masked(
    block: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hides padding from a block's first attention, which in these reads the context too; diffusers masks the other."""
    return given, named | {"attention_mask": named["encoder_attention_mask"]}
