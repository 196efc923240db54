"""The fourth stage: the UNets, each on its own text encoders and on the latents that all three share."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from models.embedded import architecture
from models.embedded.architecture import NOISE, SDXL, Family
from models.embedded.captions import caption
from models.embedded.latents import Gallery
from models.embedded.text import Reader, encode, tokenise, tokenizers
from models.embedded.training import Dice, Plan, train

EMPTY_SHARE = 0.1  # of the captions, for classifier-free guidance
ODD_SIZE_SHARE = 0.2  # of SDXL's rows, told of some other original size
LARGEST_WEIGHT = 20.0
SMALL_SHARE = 0.3  # of a new UNet's steps, on latents of half the size: layout at a quarter of the cost


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the UNet reads beside the noisy latents."""

    states: Tensor  # (rows, tokens, width)
    added: dict[str, Tensor] | None  # SDXL's pooled text and time ids


def train_unet(
    family: Family,
    reader: Reader,
    gallery: Gallery,
    plan: Plan,
    *,
    batch: int,
    start: dict[str, Tensor] | None = None,
    folder: Path,
    device: torch.device,
) -> UNet2DConditionModel:
    """Denoising with 10 % empty captions; every kind of error weighs as it does in the velocity."""
    torch.manual_seed(plan.seed)
    unet = initialised(family, start).to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # in bfloat16 on a CPU the fused attention is three times slower
    reader.to(device).eval().requires_grad_(False)
    alphas = cumulative_alphas().to(device)
    latents = gallery.latents.to(device)

    def loss(step: int, dice: Dice) -> Tensor:
        small = start is None and step < SMALL_SHARE * plan.steps
        rows = 2 * batch if small else batch
        chosen = dice.numpy.integers(len(latents), size=rows)
        clean = nn.functional.avg_pool2d(latents[chosen], 2) if small else latents[chosen]
        noise = dice.normal(*clean.shape).to(device)
        # One timestep from each of `rows` equal parts: the loss then varies less from step to step.
        timesteps = ((torch.arange(rows) + dice.uniform(rows)) / rows * 1000).long().to(device)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        captions = [caption(gallery.scenes[i], dice.numpy) for i in chosen]
        with torch.autocast(device.type, torch.bfloat16):
            condition = conditioning(family, reader, captions, dice, size=8 * clean.shape[-1])
            options = {"added_cond_kwargs": condition.added} if condition.added else {}
            predicted = unet(noisy, timesteps, condition.states, **options).sample.float()
        if family.prediction_type == "v_prediction":
            target, weight = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean, torch.ones_like(alpha)
        else:
            target, weight = noise, (1 / alpha).clamp(max=LARGEST_WEIGHT)
        return (weight * (predicted - target) ** 2).mean()

    train(unet, plan, loss, folder=folder, device=device)
    unet.set_default_attn_processor()
    return unet


def initialised(family: Family, start: dict[str, Tensor] | None) -> UNet2DConditionModel:
    """A new UNet that predicts nothing yet, or one that begins with another's weights where the shapes agree."""
    unet = architecture.unet(family)
    nn.init.zeros_(unet.conv_out.weight)
    if start is None:
        return unet
    own = unet.state_dict()
    # SD 2.1's linear projections are SD 1.5's 1x1 convolutions.
    alike = {name: t.reshape(own[name].shape) for name, t in start.items() if own[name].numel() == t.numel()}
    unet.load_state_dict(own | alike)
    return unet


def cumulative_alphas() -> Tensor:
    """(1000,): the signal's share of the variance at each timestep of the scaled-linear schedule."""
    betas = torch.linspace(NOISE["beta_start"] ** 0.5, NOISE["beta_end"] ** 0.5, NOISE["num_train_timesteps"]) ** 2
    return (1 - betas).cumprod(0)


@torch.no_grad()
def conditioning(family: Family, reader: Reader, captions: list[str], dice: Dice, *, size: int) -> Conditioning:
    """The captions encoded, some of them emptied first.

    SDXL's unconditional half is zeros where no negative prompt is given and the encoded empty text where it is `""`:
    it learns both. `size` is the picture's, in pixels.
    """
    device = reader.positions.device
    empty = dice.uniform(len(captions)) < EMPTY_SHARE
    captions = ["" if gone else text for gone, text in zip(empty, captions, strict=True)]
    tokens = [ids.to(device) for ids in tokenise(tokenizers(family), captions)]
    states, pooled = encode(reader.encoders, tokens, penultimate=family.penultimate)
    if family is not SDXL:
        return Conditioning(states=states, added=None)
    kept = (~(empty & (dice.uniform(len(captions)) < 0.5))).to(device, states.dtype)
    added = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids(len(captions), size, dice.numpy).to(device)}
    return Conditioning(states=states * kept[:, None, None], added=added)


def time_ids(rows: int, size: int, rng: np.random.Generator) -> Tensor:
    """(rows, 6): original height and width, crop's top and left, target height and width, in pixels.

    Every picture was drawn at its own size; the odd ones out keep the UNet calm when asked for other sizes.
    """
    ids = torch.tensor([size, size, 0, 0, size, size]).repeat(rows, 1).float()
    for row in np.flatnonzero(rng.random(rows) < ODD_SIZE_SHARE):
        ids[row, [0, 1, 4, 5]] = torch.from_numpy(rng.integers(8, 65, 4) * 8.0).float()
    return ids
