"""The compiled network: the same numbers, made beside the serving, and found again by the next start."""

import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from models.adapters.lora import UNET
from models.captured import LASTING
from models.card import ModelCard
from models.engine import Engine
from models.families.sd import SD
from models.parts import AdapterUse
from models.registered import Adapters
from models.request import GenerationRequest
from models.weights import Components
from tests.models.conftest import drawn, folder, loaded_family

DEADLINE_S = 240.0


def small_unet() -> UNet2DConditionModel:
    """One block each way, so that compiling takes seconds."""
    torch.manual_seed(0)
    width = loaded_family("sd15").network_config["cross_attention_dim"]
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=8,
        norm_num_groups=8,
        cross_attention_dim=width,
    )
    return unet.eval().requires_grad_(False)


def small_engine(cache: Path | None, adapters: Path | None = None) -> Engine:
    family = loaded_family("sd15")
    modules = {
        "unet": small_unet(),
        "vae": family.autoencoder._vae,
        "text_encoder": family._encoder,
        "tokenizer": family._tokenizer,
    }
    components = Components(modules, family.scheduler_config, {}, "small")
    small = SD(components, replace(family.placement, compiled=cache))
    return Engine(small, ModelCard.read("sd15", "sd", folder("sd15")), adapters=Adapters(small, adapters))
