"""What the families with one CLIP text encoder and a UNet have in common."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from models import encoders
from models.autoencoder import Autoencoder
from models.family import Conditioning, Embedding, Encoding
from models.tokens import Wording, cut
from models.weights import Components, Placement

COMPONENTS: dict[str, type] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
}


class OneEncoder:
    """All of models.family.Family but `predict`; the context is the encoder's last hidden state, through its norm."""

    zero_empty_negative = False
    takes_mask = False

    def __init__(self, components: Components, placement: Placement):
        self._unet: Any = components.modules["unet"]
        self._text_encoder: Any = components.modules["text_encoder"]
        self._tokenizer: Any = components.modules["tokenizer"]
        self.placement = placement
        self.networks = {"unet": self._unet, "text_encoder": self._text_encoder}
        self.network_config = self._unet.config
        self.guidance_width = self._unet.config.time_cond_proj_dim or 0
        self.device = placement.device
        self.autoencoder = Autoencoder(components.modules["vae"], placement.device)
        self.revision = components.revision
        self.scheduler_config = components.scheduler_config
        self.text_widths = encoders.widths(self._text_encoder)
        self.clip_skips = encoders.most_skipped(1, self._text_encoder)

    @torch.inference_mode()
    def embed(self, wordings: Sequence[Wording], encoding: Encoding) -> list[Embedding]:
        cuts = [cut([self._tokenizer], wording) for wording in wordings]
        chunks = [chunk for one in cuts for chunk in one.chunks[0]]
        hidden, pooled = encoders.hidden_states(self._text_encoder, chunks, 1, encoding)
        hidden = encoders.emphasized(self._context(hidden), chunks)
        sizes = [one.report.chunks for one in cuts]
        dtype = self.placement.dtype
        parts = zip(hidden.to(dtype).split(sizes), pooled.to(dtype).split(sizes), cuts, strict=True)
        return [
            Embedding(context=c.flatten(0, 1).clone(), pooled=p[0].clone(), report=one.report) for c, p, one in parts
        ]

    def condition(self, embedding: Embedding, width: int, height: int) -> Conditioning:
        return Conditioning(context=embedding.context)

    def _context(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (chunks, tokens, width) as the UNet attends to them."""
        return encoders.normalized(self._text_encoder, hidden)
