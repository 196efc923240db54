"""A full-size model put together: as diffusers' pipeline, as an engine, and as files."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from bench.fullsize import Network
from bench.inprocess import MAX_WAITING
from bench.pipeline import Pipeline
from models.card import ModelCard
from models.embedded import architecture
from models.engine import Engine
from models.families.sd import SD
from models.families.sdxl import SDXL
from models.forward import leaves
from models.fp8 import quantise
from models.registered import Adapters
from models.weights import Components, Placement


def pipeline(network: Network, modules: Mapping[str, Any]) -> Pipeline:
    """diffusers' own, in whatever precision the networks have."""
    parts = dict(modules, scheduler=architecture.FAMILIES[network.embedded].scheduler())
    if network.family == "sdxl":
        return Pipeline(StableDiffusionXLPipeline(**parts, add_watermarker=False))
    return Pipeline(
        StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    )


def engine(
    network: Network,
    components: Components,
    placement: Placement,
    side: int,
    cap: int | None = None,
    adapters: Path | None = None,
    remembering: bool = True,
) -> Engine:
    """Warmed up at pictures of this side; its cap in rows is measured in the warm-up unless it is given.

    Where it is not `remembering`, keys and values of a prompt are made in every step, as diffusers does. In FP8 it has
    a UNet of its own.
    """
    if placement.fp8:
        eight = deepcopy(components.modules["unet"])
        quantise(eight)
        components = replace(components, modules=components.modules | {"unet": eight})
    family = (SDXL if network.family == "sdxl" else SD)(components, placement)
    if not remembering:
        components.modules["unet"].set_attn_processor(AttnProcessor2_0())
    made = Engine(family, card(network, side), max_waiting=MAX_WAITING, adapters=Adapters(family, adapters))
    made.warm_up(cap)
    return made


def card(network: Network, side: int) -> ModelCard:
    """Of pictures of this side, and up to four times as large."""
    return ModelCard(name=network.name, family=network.family, width=side, height=side, max_pixels=4 * side**2)


def restore(unet: Any) -> None:
    """Takes off what engines and compilers have put on a UNet, so that the next contender finds diffusers' own."""
    vars(unet).pop("forward", None)
    unet.set_attn_processor(AttnProcessor2_0())


def compiled_forward(unet: Any, mode: str) -> Callable[..., Any]:
    """A compiled forward to put in the place of the UNet's own. As in Heliograph's (models.compiled) the number of rows
    is a variable of what is compiled, so that groups of all sizes need one compilation."""
    fused = torch.compile(unet.forward, mode=mode)

    def forward(*given: Any, **named: Any) -> Any:
        for _, tensor in leaves((given, named)):
            if tensor.dim():
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return fused(*given, **named)

    return forward


def write(network: Network, modules: Mapping[str, Any], folder: Path) -> None:
    """The model as a diffusers folder of safetensors, in the precision that it has."""
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    architecture.FAMILIES[network.embedded].scheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": True}))
