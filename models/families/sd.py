"""Stable Diffusion 1.5 and 2.1: one text encoder, a UNet with cross-attention, epsilon or v prediction.

The two differ in configuration alone: SD 2.1's files carry an OpenCLIP encoder without its last layer, so that its last
hidden state is the penultimate one of the original.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from models import encoders
from models.autoencoder import Autoencoder
from models.family import Conditioning, Embedding, Encoding, Residuals, run_unet, takes_mask
from models.tokens import Wording, cut
from models.weights import Components, Placement, Source
from models.weights import load as load_weights

COMPONENTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
}


def load(source: Source, placement: Placement) -> "SD":
    return SD(load_weights(source, COMPONENTS, placement), placement)


class SD:
    """SD 1.5 or 2.1 with weights; see models.family.Family."""

    zero_empty_negative = False

    def __init__(self, components: Components, placement: Placement):
        self._unet: Any = components.modules["unet"]
        self._text_encoder: Any = components.modules["text_encoder"]
        self._tokenizer: Any = components.modules["tokenizer"]
        self.placement = placement
        self.networks = {"unet": self._unet, "text_encoder": self._text_encoder}
        self.network_config = self._unet.config
        self.device = placement.device
        self._dtype = placement.dtype
        self.autoencoder = Autoencoder(components.modules["vae"], placement.device)
        self.takes_mask = takes_mask(self._unet, self.autoencoder.channels)
        self.revision = components.revision
        self.scheduler_config = components.scheduler_config
        self.text_widths = encoders.widths(self._text_encoder)
        self.clip_skips = encoders.most_skipped(1, self._text_encoder)

    @torch.inference_mode()
    def embed(self, wordings: Sequence[Wording], encoding: Encoding) -> list[Embedding]:
        cuts = [cut([self._tokenizer], wording) for wording in wordings]
        chunks = [chunk for one in cuts for chunk in one.chunks[0]]
        hidden, _ = encoders.hidden_states(self._text_encoder, chunks, 1, encoding)
        hidden = encoders.emphasized(encoders.normalized(self._text_encoder, hidden), chunks).to(self._dtype)
        contexts = hidden.split([one.report.chunks for one in cuts])
        return [
            Embedding(context=c.flatten(0, 1).clone(), report=one.report) for c, one in zip(contexts, cuts, strict=True)
        ]

    def condition(self, embedding: Embedding, width: int, height: int) -> Conditioning:
        return Conditioning(context=embedding.context)

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        rows: Conditioning,
        residuals: Residuals | None = None,
    ) -> torch.Tensor:
        return run_unet(self._unet, latents, timesteps, rows, residuals)
