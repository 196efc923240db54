"""A full-size model put together: as diffusers' pipeline, and as an engine."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from bench.fullsize import Network
from bench.inprocess import MAX_WAITING
from bench.pipeline import Pipeline
from models.card import ModelCard
from models.embedded import architecture
from models.engine import Engine
from models.families.sd import SD
from models.families.sdxl import SDXL
from models.weights import Components, Placement


def pipeline(network: Network, modules: Mapping[str, Any], unet: torch.nn.Module | None = None) -> Pipeline:
    """diffusers' own, in whatever precision the networks have; with another UNet where one is given."""
    parts = dict(modules, scheduler=architecture.FAMILIES[network.embedded].scheduler())
    if unet is not None:
        parts["unet"] = unet
    if network.family == "sdxl":
        return Pipeline(StableDiffusionXLPipeline(**parts, add_watermarker=False))
    return Pipeline(
        StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    )


def engine(network: Network, components: Components, placement: Placement, side: int, cap: int | None = None) -> Engine:
    """Warmed up at pictures of this side; its cap in rows is measured in the warm-up unless it is given."""
    family = (SDXL if network.family == "sdxl" else SD)(components, placement)
    card = ModelCard(name=network.name, family=network.family, width=side, height=side, max_pixels=4 * side**2)
    made = Engine(family, card, max_waiting=MAX_WAITING)
    made.warm_up(cap)
    return made
