"""Few-step models as diffusers saves them, made of the embedded ones: another scheduler, and one more input."""

import shutil
from functools import cache
from pathlib import Path

import diffusers
import torch

from models import families
from models.card import ModelCard
from models.engine import Engine
from models.registered import Adapters
from models.weights import read_json
from tests.models.conftest import FAMILIES, folder, pipeline

GUIDANCE_WIDTH = 64
LORAS = Path("models/embedded/loras")


def latent_consistency(base: str, where: Path) -> Path:
    """A base's networks, and in the UNet an untrained layer that the guidance scale goes through."""
    parts = dict(pipeline(base).components)
    unet = diffusers.UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=GUIDANCE_WIDTH)
    lacking = unet.load_state_dict(parts["unet"].state_dict(), strict=False)
    assert lacking.missing_keys == ["time_embedding.cond_proj.weight"]
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.2, generator=torch.Generator().manual_seed(3))
    parts |= {"unet": unet, "scheduler": diffusers.LCMScheduler.from_config(parts["scheduler"].config)}
    if base == "sdxl":
        made = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        made = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    made.save_pretrained(where, safe_serialization=True)
    return where


def scheduled(base: str, where: Path, scheduler: str, **options: object) -> Path:
    """A base with another scheduler of its own, as Turbo's and Lightning's folders have it."""
    shutil.copytree(folder(base), where)
    config = read_json(where / "scheduler" / "scheduler_config.json")
    index = where / "model_index.json"
    old = read_json(index)["scheduler"][1]
    index.write_text(index.read_text().replace(f'"{old}"', f'"{scheduler}"'))
    kind = getattr(diffusers, scheduler)
    kind.from_config({k: v for k, v in config.items() if not k.startswith("_")} | options).save_pretrained(
        where / "scheduler"
    )
    return where


@cache
def family(base: str, where: Path) -> families.Family:
    return families.load(family=FAMILIES[base], source=str(where), device="cpu", dtype="float32")


def engine(base: str, where: Path, controlnets: dict[str, str] | None = None, **defaults: object) -> Engine:
    """With 64 rows to a forward, so that whoever can share one does."""
    card = ModelCard.read(base, FAMILIES[base], str(where), defaults)
    loaded = family(base, where)
    loras = LORAS if base == "sd15" else None
    made = Engine(loaded, card, adapters=Adapters(loaded, loras, controlnets or {}))
    made.batcher.set_cap((4, 16, 16), 64)
    return made


@cache
def by_diffusers(where: Path) -> diffusers.DiffusionPipeline:
    """The pipeline that the folder says it is, untouched."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(where, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
