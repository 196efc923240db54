"""Attention in diffusers' UNets: the keys and values of a prompt are made once for as long as a batch stays together.

What pictures are told stays the same from step to step, only their latents change; diffusers projects both every time.
The arithmetic is that of its AttnProcessor2_0, without its division by a factor that is 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn.functional import scaled_dot_product_attention

BYTES = 512 * 2**20  # what is remembered of a batch at most: 20 rows of SDXL's in bfloat16, fewer of long prompts
Pair = tuple[torch.Tensor, torch.Tensor]


class KeysAndValues:
    """By the layer that made them, (rows, heads, tokens, width) each; those beyond BYTES are made again every time."""

    def __init__(self) -> None:
        self._kept: dict[torch.nn.Module, Pair] = {}
        self._room = BYTES

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, layer: torch.nn.Module, make: Callable[[], Pair]) -> Pair:
        """A layer's, made where they are not kept."""
        if layer in self._kept:
            return self._kept[layer]
        pair = make()
        size = sum(tensor.nbytes for tensor in pair)
        if size <= self._room:
            self._kept[layer] = pair
            self._room -= size
        return pair


class Remembering:
    """A processor for attention layers; what it is handed as `remembered` it fills, and uses from then on."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        remembered: KeysAndValues | None = None,
    ) -> torch.Tensor:
        """(rows, positions, width) -> the same; the mask (rows, 1, tokens) is added to the logits."""
        if encoder_hidden_states is None or remembered is None:
            told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key, value = _keys_and_values(attn, told)
        else:
            key, value = remembered.get(attn, partial(_keys_and_values, attn, encoder_hidden_states))
        query = _heads(attn, attn.to_q(hidden_states))
        mask = None if attention_mask is None else attention_mask[:, None]
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def _keys_and_values(attn: Any, told: torch.Tensor) -> Pair:
    return _heads(attn, attn.to_k(told)), _heads(attn, attn.to_v(told))


def _heads(attn: Any, projected: torch.Tensor) -> torch.Tensor:
    """(rows, n, width) -> (rows, heads, n, width / heads)."""
    return projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def remember(unet: torch.nn.Module) -> None:
    """Puts the processor on every layer of a UNet that does no more than it; the others keep theirs."""
    for layer in unet.modules():
        if isinstance(layer, Attention) and _is_plain(layer):
            layer.set_processor(Remembering())  # pyright: ignore[reportArgumentType]  (diffusers names its own alone)


def _is_plain(layer: Any) -> bool:
    norms = (layer.spatial_norm, layer.group_norm, layer.norm_q, layer.norm_k, layer.norm_cross)
    bare = all(norm is None for norm in norms) and not layer.residual_connection
    return bare and layer.rescale_output_factor == 1.0 and type(layer.processor) is AttnProcessor2_0
