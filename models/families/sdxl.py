"""Stable Diffusion XL: two text encoders side by side, a pooled embedding and the picture's size as conditioning.

Source: arXiv:2307.01952. The sizes are those of the picture asked for, uncropped, as diffusers' pipeline has them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.autoencoder import Autoencoder
from models.family import Conditioning, Embedding, takes_mask
from models.tokens import tokenize
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
        self._encoders: list[tuple[Any, Any]] = [
            (modules["tokenizer"], modules["text_encoder"]),
            (modules["tokenizer_2"], modules["text_encoder_2"]),
        ]
        self.placement = placement
        self.network_config = self._unet.config
        self.device = placement.device
        self._dtype = placement.dtype
        self.autoencoder = Autoencoder(modules["vae"], placement.device)
        self.takes_mask = takes_mask(self._unet, self.autoencoder.channels)
        self.revision = components.revision
        self.scheduler_config = components.scheduler_config
        self.zero_empty_negative = bool(components.index.get("force_zeros_for_empty_prompt", True))

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str], clip_skip: int) -> list[Embedding]:
        contexts, pooled, truncated = [], None, []
        for tokenizer, encoder in self._encoders:
            ids, truncated = tokenize(tokenizer, prompts)
            output = encoder(ids.to(self.device), output_hidden_states=True)
            contexts.append(output.hidden_states[-(clip_skip + 2)].to(self._dtype))  # SDXL counts from the penultimate
            pooled = output[0].to(self._dtype)
        assert pooled is not None
        context = torch.cat(contexts, -1)
        return [Embedding(context=c, pooled=p, truncated=t) for c, p, t in zip(context, pooled, truncated, strict=True)]

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
        residuals: tuple[list[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        down, mid = residuals or (None, None)
        return self._unet(
            latents.to(self._dtype),
            timesteps,
            rows.context,
            encoder_attention_mask=rows.mask,
            added_cond_kwargs=dict(rows.added),
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0].float()
