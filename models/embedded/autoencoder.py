"""The first stage: the autoencoder that all three models share."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from models.embedded import architecture
from models.embedded.drawing import pixels, render
from models.embedded.training import Dice, Plan, train
from models.embedded.world import any_scene

CROP = 64  # pixels
WHOLE_PICTURES = 0.9  # the share of the steps after which whole pictures take over from crops


def train_autoencoder(plan: Plan, *, batch: int, folder: Path, device: torch.device) -> AutoencoderKL:
    """Reconstruction (L1) with a slight pull towards a unit Gaussian; crops first, whole pictures at the end."""
    torch.manual_seed(plan.seed)
    vae = initialised(architecture.autoencoder()).to(memory_format=torch.channels_last)

    def loss(step: int, dice: Dice) -> Tensor:
        whole = step >= WHOLE_PICTURES * plan.steps
        pictures = whole_pictures(max(1, batch // 4), dice.numpy) if whole else crops(batch, dice.numpy)
        x = signed(pictures).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=not whole):
            posterior = vae.encode(x).latent_dist
            noise = dice.normal(*posterior.mean.shape).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        divergence = 0.5 * (posterior.mean.float() ** 2 + posterior.var - 1 - posterior.logvar).mean()
        return (decoded.float() - x).abs().mean() + 1e-4 * divergence

    train(vae, plan, loss, folder=folder, device=device)
    standardise(vae, whole_pictures(200 if plan.steps > 100 else 8, np.random.default_rng(plan.seed)))
    return vae


def initialised(vae: AutoencoderKL) -> AutoencoderKL:
    """Weights that keep the signal's size: torch's own initial weights stall on a plateau for hundreds of steps."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith(".conv2"):
                module.weight.data.mul_(0.1)
    vae.quant_conv.weight.data[4:] *= 0.01  # start nearly noiseless
    vae.quant_conv.bias.data[4:] = -6
    return vae


def whole_pictures(count: int, rng: np.random.Generator) -> Tensor:
    """(count, 3, 128, 128) of uint8."""
    return torch.from_numpy(np.stack([pixels(render(any_scene(rng), rng)) for _ in range(count)]))


def crops(count: int, rng: np.random.Generator) -> Tensor:
    """(count, 3, CROP, CROP) of uint8, each centred near an object's edge: the plain background teaches little."""
    found = []
    for _ in range(count):
        scene = any_scene(rng)
        picture = pixels(render(scene, rng))
        thing = scene.things[rng.integers(len(scene.things))]
        angle = rng.uniform(0, 2 * np.pi)
        centre = np.array([thing.x, thing.y]) + 0.9 * thing.radius * np.array([np.cos(angle), np.sin(angle)])
        x, y = np.clip(centre * picture.shape[-1] - CROP / 2, 0, picture.shape[-1] - CROP).astype(int)
        found.append(picture[:, y : y + CROP, x : x + CROP])
    return torch.from_numpy(np.stack(found))


def signed(pictures: Tensor) -> Tensor:
    """uint8 to floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def standardise(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Folds the latents' mean and spread into the 1x1 convolutions: latents then have mean 0 and spread 1."""
    device = vae.quant_conv.weight.device
    latents = torch.cat([vae.encode(signed(some).to(device)).latent_dist.mean for some in pictures.split(20)])
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inward, outward = vae.quant_conv, vae.post_quant_conv
    inward.bias[:4] -= mean
    outward.bias += (outward.weight[:, :, 0, 0] * mean).sum(1)
    rescale(vae, 1 / spread)


@torch.no_grad()
def rescale(vae: AutoencoderKL, factor: Tensor) -> None:
    """Multiplies the latents by a factor for each channel, without any change to the pictures."""
    inward, outward = vae.quant_conv, vae.post_quant_conv
    inward.weight[:4] *= factor[:, None, None, None]
    inward.bias[:4] *= factor
    inward.bias[4:] += 2 * factor.log()
    outward.weight /= factor[None, :, None, None]


def with_scaling_factor(vae: AutoencoderKL, scaling_factor: float) -> AutoencoderKL:
    """A copy whose latents need that factor, the original's own, to have a spread of 1."""
    copy = architecture.autoencoder(scaling_factor)
    copy.load_state_dict(vae.state_dict())
    rescale(copy, torch.full((4,), 1 / scaling_factor))
    return copy.eval()
