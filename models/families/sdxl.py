"""Stable Diffusion XL: two text encoders side by side, a pooled embedding and the picture's size as conditioning.

Source: arXiv:2307.01952. The sizes are those of the picture asked for, uncropped, as diffusers' pipeline has them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models import encoders
from models.attention import remember
from models.autoencoder import Autoencoder
from models.family import Conditioning, Embedding, Encoding, Residuals, run_unet, takes_mask
from models.tokens import Wording, cut
from models.weights import Components, Placement, Source
from models.weights import load as load_weights

COMPONENTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
}


def load(source: Source, placement: Placement) -> "SDXL":
    return SDXL(load_weights(source, COMPONENTS, placement), placement)


class SDXL:
    """SDXL with weights; see models.family.Family."""

    def __init__(self, components: Components, placement: Placement):
        modules = components.modules
        self._unet: Any = modules["unet"]
        self._tokenizers: list[Any] = [modules["tokenizer"], modules["tokenizer_2"]]
        self._encoders: list[Any] = [modules["text_encoder"], modules["text_encoder_2"]]
        self.text_widths = encoders.widths(*self._encoders)
        self.clip_skips = encoders.most_skipped(2, *self._encoders)
        self.placement = placement
        self.networks = {name: modules[name] for name in ("unet", "text_encoder", "text_encoder_2")}
        self.network_config = self._unet.config
        self.device = placement.device
        self._dtype = placement.dtype
        self.autoencoder = Autoencoder(modules["vae"], placement.device)
        self.takes_mask = takes_mask(self._unet, self.autoencoder.channels)
        self.guidance_width = self._unet.config.time_cond_proj_dim or 0
        remember(self._unet)
        self.revision = components.revision
        self.scheduler_config = components.scheduler_config
        self.zero_empty_negative = bool(components.index.get("force_zeros_for_empty_prompt", True))

    @torch.inference_mode()
    def embed(self, wordings: Sequence[Wording], encoding: Encoding) -> list[Embedding]:
        cuts = [cut(self._tokenizers, wording) for wording in wordings]
        contexts, pooled = [], torch.empty(0)
        for k, encoder in enumerate(self._encoders):
            chunks = [chunk for one in cuts for chunk in one.chunks[k]]
            hidden, pooled = encoders.hidden_states(encoder, chunks, 2, encoding)  # SDXL counts from the penultimate
            contexts.append(encoders.emphasized(hidden, chunks).to(self._dtype))
        sizes = [one.report.chunks for one in cuts]
        parts = zip(torch.cat(contexts, -1).split(sizes), pooled.to(self._dtype).split(sizes), cuts, strict=True)
        return [
            Embedding(context=c.flatten(0, 1).clone(), pooled=p[0].clone(), report=one.report) for c, p, one in parts
        ]

    def condition(self, embedding: Embedding, width: int, height: int) -> Conditioning:
        assert embedding.pooled is not None
        sizes = [height, width, 0, 0, height, width]  # original size, crop's corner, target size
        time_ids = torch.tensor(sizes, device=self.device, dtype=self._dtype)
        return Conditioning(context=embedding.context, added={"text_embeds": embedding.pooled, "time_ids": time_ids})

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        rows: Conditioning,
        residuals: Residuals | None = None,
    ) -> torch.Tensor:
        handed = {"remembered": rows.remembered}
        return run_unet(self._unet, latents, timesteps, rows, residuals, cross_attention_kwargs=handed)
