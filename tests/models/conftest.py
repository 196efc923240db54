"""The embedded models, loaded once for all tests: as engines, and as diffusers' own pipelines to compare with."""

import io
from contextlib import nullcontext
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from models import families
from models.card import ModelCard
from models.engine import Engine
from models.images import Picture
from models.request import GenerationRequest
from models.samplers import SAMPLERS, SCHEDULES

FAMILIES = {"sd15": "sd", "sd21": "sd", "sdxl": "sdxl"}


def folder(name: str) -> str:
    return f"models/embedded/{name}"


@cache
def loaded_family(name: str) -> families.Family:
    return families.load(family=FAMILIES[name], source=folder(name), device="cpu", dtype="float32")


def new_engine(name: str, **options) -> Engine:
    card = ModelCard.read(name, FAMILIES[name], folder(name))
    return Engine(loaded_family(name), card, max_waiting=1000, **options)


@cache
def pipeline(name: str) -> diffusers.DiffusionPipeline:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(name), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference(kind: str, parts: dict[str, object], request: GenerationRequest, **options: object) -> np.ndarray:
    """What a pipeline of diffusers', named like a class of theirs less its family and "Pipeline", draws of a request.

    The parts are shared and stay as they are: the scheduler is the call's own.
    """
    xl = "tokenizer_2" in parts
    named = SAMPLERS[request.sampler]
    config = dict(parts["scheduler"].config) | dict(named.options) | dict(SCHEDULES[request.schedule])
    scheduler = getattr(diffusers, named.scheduler).from_config(config)
    made = getattr(diffusers, f"StableDiffusion{'XL' if xl else ''}{kind}Pipeline")
    pipe = made(**parts | {"scheduler": scheduler}, **({} if xl else {"requires_safety_checker": False}))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt or None,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        **options,
    ).images
    return np.asarray(images[0]).astype(int)


def bare(rows: object) -> nullcontext[None]:
    """An `encoding` for text encoders that nothing is put on."""
    return nullcontext()


def sketch() -> Picture:
    """A smooth coloured picture to start from."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Picture.from_array(coarse).resized(128, 128)


def drawn(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture
def engine() -> Engine:
    return new_engine("sd15")
