"""Stable Diffusion's latent x2 upscaler: a K-UNet that sees the small picture's latents, doubled, beside its own.

Source: Katherine Crowson's k-diffusion upscaler, as diffusers' StableDiffusionLatentUpscalePipeline runs it, with the
preconditioning of arXiv:2206.00364 (table 1). At noise s that is D(x) = x / (s^2 + 1) + F s / sqrt(s^2 + 1), which is
what schedulers make of -F as a v-prediction: so that is what they are told it is, and every sampler that knows v runs.
The network is told log(s) / 4 for the time, which diffusers calls a continuous timestep.
"""

import torch
from torch.nn.functional import interpolate

from models.errors import InvalidRequest
from models.family import Conditioning, Embedding, Residuals, run_unet
from models.images import Picture
from models.one_encoder import COMPONENTS, OneEncoder
from models.upscaling import UPSCALING
from models.weights import Components, Placement, Source
from models.weights import load as load_weights

_NOISE_FEATURES = 128  # of the noise on the picture, whose level is 0 always: half of them cosines, half sines


def load(source: Source, placement: Placement) -> "SDx2":
    return SDx2(load_weights(source, COMPONENTS, placement), placement)


class SDx2(OneEncoder):
    """The latent x2 upscaler with weights; see models.family.UpscalingFamily. Raises InvalidRequest for other UNets."""

    scale = UPSCALING["sd_x2"].scale

    def __init__(self, components: Components, placement: Placement):
        super().__init__(components, placement)
        self.guidance_width = 0  # what its UNet is told there is something else
        config, channels = self._unet.config, self.autoencoder.channels
        told = _NOISE_FEATURES + self.text_widths[0]
        if (config.in_channels, config.out_channels, config.time_cond_proj_dim) != (2 * channels, channels + 1, told):
            raise InvalidRequest(
                "source",
                f"no latent upscaler: its UNet takes {2 * channels} channels and {told} conditions on time, and gives "
                f"{channels + 1} channels",
            )
        self.scheduler_config = {
            **components.scheduler_config,
            "prediction_type": "v_prediction",
            "timestep_type": "continuous",
            "clip_sample": False,  # Euler's configuration does not say it, and latents have no bounds to clip at
        }
        # K-UNets halve their input at every block but the last; they cannot halve what is odd, nor double a single row.
        self.multiple = self.autoencoder.factor * max(1, 2 ** (len(config.block_out_channels) - 1) // self.scale)
        self.least = 2 * self.multiple

    def condition(self, embedding: Embedding, width: int, height: int) -> Conditioning:
        assert embedding.pooled is not None
        noise = torch.zeros_like(embedding.pooled[:1]).repeat(_NOISE_FEATURES)
        noise[: _NOISE_FEATURES // 2] = 1
        return Conditioning(context=embedding.context, added={"timestep_cond": torch.cat([noise, embedding.pooled])})

    def shown(self, picture: Picture, noise_level: int, generator: torch.Generator) -> torch.Tensor:
        """The picture's latents at twice their size. `noise_level` is 0: models.upscaling allows no other."""
        latents = self.autoencoder.encode([picture], [generator])[0]
        return interpolate(latents[None], scale_factor=self.scale, mode="nearest")[0]

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        rows: Conditioning,
        residuals: Residuals | None = None,
    ) -> torch.Tensor:
        output = run_unet(self._unet, latents, timesteps, rows, residuals)
        return -output[:, :-1]  # the last channel is a variance that nothing uses

    def _context(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden  # as the encoder's last layer left it
