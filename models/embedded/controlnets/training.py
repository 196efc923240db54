"""Training: a copy of the frozen UNet's encoder learns to steer it by edges (Zhang et al., arXiv:2302.05543)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from models.embedded.architecture import Family
from models.embedded.captions import caption
from models.embedded.controlnets.gallery import Gallery
from models.embedded.denoiser import LARGEST_WEIGHT, conditioning, cumulative_alphas
from models.embedded.text import Reader
from models.embedded.training import Dice, Plan, train

HINT_WIDTHS = (16, 32, 48, 64)  # of the layers that bring a 128-pixel hint down to the latents' 16


@dataclass(frozen=True, kw_only=True)
class Base:
    """A trained model as it ships, frozen."""

    family: Family
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    reader: Reader


def load_base(family: Family, folder: Path) -> Base:
    """Reads the model in `folder`, in float32."""
    reader = Reader(family)
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    reader.encoders = torch.nn.ModuleList(
        kinds[i].from_pretrained(folder / name, dtype=torch.float32)
        for i, name in enumerate(("text_encoder", "text_encoder_2")[: family.text_encoders])
    )
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    for network in (unet, vae, reader):
        network.eval().requires_grad_(False)
    return Base(family=family, unet=unet, vae=vae, reader=reader)


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """The UNet's encoder copied, behind zero convolutions: at first it changes nothing."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_WIDTHS)


def train_controlnet(
    base: Base, gallery: Gallery, plan: Plan, *, batch: int, folder: Path, device: torch.device
) -> ControlNetModel:
    """Denoising with the edges as hint; the UNet's own loss, and gradients only through its decoder."""
    torch.manual_seed(plan.seed)
    net = new_controlnet(base.unet).to(memory_format=torch.channels_last)
    unet, reader = base.unet.to(device, memory_format=torch.channels_last), base.reader.to(device)
    for network in (net, unet):
        network.set_attn_processor(AttnProcessor())  # in bfloat16 on a CPU the fused attention is three times slower
    alphas = cumulative_alphas().to(device)

    def loss(step: int, dice: Dice) -> Tensor:
        chosen = dice.numpy.integers(len(gallery.scenes), size=batch)
        clean = gallery.latents[chosen].to(device)
        hint = gallery.edges[chosen].to(device).float().expand(-1, 3, -1, -1)
        noise = dice.normal(*clean.shape).to(device)
        timesteps = ((torch.arange(batch) + dice.uniform(batch)) / batch * 1000).long().to(device)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        captions = [caption(gallery.scenes[i], dice.numpy) for i in chosen]
        with torch.autocast(device.type, torch.bfloat16):
            condition = conditioning(base.family, reader, captions, dice, size=8 * clean.shape[-1])
            inputs = (noisy, timesteps, condition.states)
            down, mid = net(*inputs, hint, added_cond_kwargs=condition.added, return_dict=False)
            predicted = unet(
                *inputs,
                added_cond_kwargs=condition.added,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
                return_dict=False,
            )[0].float()
        return ((1 / alpha).clamp(max=LARGEST_WEIGHT) * (predicted - noise) ** 2).mean()

    train(net, plan, loss, folder=folder, device=device)
    for network in (net, unet):
        network.set_default_attn_processor()
    return net
