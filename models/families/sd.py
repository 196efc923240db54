"""Stable Diffusion 1.5 and 2.1: one text encoder, a UNet with cross-attention, epsilon or v prediction.

The two differ in configuration alone: SD 2.1's files carry an OpenCLIP encoder without its last layer, so that its last
hidden state is the penultimate one of the original.
"""

import torch

from models.attention import remember
from models.family import Conditioning, Residuals, run_unet, takes_mask
from models.one_encoder import COMPONENTS, OneEncoder
from models.weights import Components, Placement, Source
from models.weights import load as load_weights


def load(source: Source, placement: Placement) -> "SD":
    return SD(load_weights(source, COMPONENTS, placement), placement)


class SD(OneEncoder):
    """SD 1.5 or 2.1 with weights; see models.family.Family."""

    def __init__(self, components: Components, placement: Placement):
        super().__init__(components, placement)
        self.takes_mask = takes_mask(self._unet, self.autoencoder.channels)
        remember(self._unet)

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        rows: Conditioning,
        residuals: Residuals | None = None,
    ) -> torch.Tensor:
        handed = {"remembered": rows.remembered}
        return run_unet(self._unet, latents, timesteps, rows, residuals, cross_attention_kwargs=handed)
