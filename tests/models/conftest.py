"""The embedded models, loaded once for all tests: as engines, and as diffusers' own pipelines to compare with."""

from functools import cache

import diffusers
import pytest
import torch

from models import families
from models.card import ModelCard
from models.engine import Engine

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


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture
def engine() -> Engine:
    return new_engine("sd15")
