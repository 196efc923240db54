"""The recipe: every stage's plan in one table, and the order in which one stage feeds the next."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from models.embedded.architecture import FAMILIES, SD15, SD21, Family
from models.embedded.autoencoder import train_autoencoder, with_scaling_factor
from models.embedded.denoiser import train_unet
from models.embedded.export import export
from models.embedded.latents import Gallery, gallery
from models.embedded.text import Reader, tokenizers, train_text_encoders
from models.embedded.training import Plan

PICTURES = 10000
PLANS = {
    "autoencoder": Plan(name="autoencoder", steps=2400, learning_rate=1e-3, weight_decay=1e-3),
    "text_sd15": Plan(name="text_sd15", steps=2000, learning_rate=1.5e-3),
    "text_sd21": Plan(name="text_sd21", steps=200, learning_rate=5e-4),
    "text_sdxl": Plan(name="text_sdxl", steps=300, learning_rate=7e-4),
    "unet_sd15": Plan(name="unet_sd15", steps=2400, learning_rate=1.5e-3, muon=True),
    "unet_sd21": Plan(name="unet_sd21", steps=1300, learning_rate=1e-3, muon=True),
    "unet_sdxl": Plan(name="unet_sdxl", steps=3000, learning_rate=1.5e-3, muon=True),
}
BATCHES = {"autoencoder": 8, "text": 64, "unet": 32}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The stages, each of which trains, resumes or, once finished, only loads from `folder`."""

    folder: Path
    device: torch.device
    scale: float = 1.0  # of every number of steps and pictures: a test runs the whole recipe at a thousandth
    workers: int = 2

    def plan(self, name: str) -> Plan:
        """The stage's plan at this scale."""
        plan = PLANS[name]
        return replace(plan, steps=max(2, round(plan.steps * self.scale)))

    def options(self, kind: str) -> dict:
        """What every stage of that kind is called with."""
        batch = BATCHES[kind] if self.scale > 0.1 else 2
        return {"batch": batch, "folder": self.folder, "device": self.device}

    def vae(self) -> AutoencoderKL:
        """The autoencoder, shared by all three."""
        return train_autoencoder(self.plan("autoencoder"), **self.options("autoencoder"))

    def reader(self, family: Family) -> Reader:
        """The family's text encoders; 2.1's and XL's begin as 1.5's (XL's first one is 1.5's in the originals)."""
        start = None if family is SD15 else self.reader(SD15)
        return train_text_encoders(family, self.plan(f"text_{family.name}"), start=start, **self.options("text"))

    def gallery(self) -> Gallery:
        """The training pictures, encoded."""
        count = max(8, round(PICTURES * self.scale))
        return gallery(self.vae().cpu(), count, folder=self.folder / "latents", workers=self.workers)

    def unet(self, family: Family) -> UNet2DConditionModel:
        """The family's UNet; 2.1's begins as 1.5's and learns to predict velocities."""
        start = self.unet(SD15).state_dict() if family is SD21 else None
        return train_unet(
            family,
            self.reader(family),
            self.gallery(),
            self.plan(f"unet_{family.name}"),
            start=start,
            **self.options("unet"),
        )

    def make(self, name: str, out: Path) -> None:
        """Trains the model of that name and writes it to `out/name`."""
        family = FAMILIES[name]
        self.write(family, self.unet(family), out / name)

    def write(self, family: Family, unet: UNet2DConditionModel, folder: Path) -> None:
        """Writes the family's model with that UNet, which may still be in training."""
        export(
            family,
            folder,
            tokenizers=tokenizers(family),
            text_encoders=list(self.reader(family).cpu().encoders),
            vae=with_scaling_factor(self.vae().cpu(), family.scaling_factor),
            unet=unet.cpu(),
        )
