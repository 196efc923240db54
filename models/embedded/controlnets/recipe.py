"""The plans of the two ControlNets, and the way from a base model's folder to a ControlNet's."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ControlNetModel

from models.embedded.architecture import FAMILIES
from models.embedded.controlnets.gallery import gallery
from models.embedded.controlnets.training import load_base, train_controlnet
from models.embedded.export import forget_where_it_was_made
from models.embedded.training import Plan

PICTURES = 6000
BATCH = 16
PLANS = {
    name: Plan(
        name=f"canny_{name}",
        steps=steps,
        learning_rate=1e-3,
        averaging=0.99,
        checkpoint_every=100,
        muon=True,
    )
    for name, steps in {"sd15": 1100, "sdxl": 1200}.items()
}


def make(name: str, models: Path, out: Path, work: Path, *, device: torch.device, scale: float = 1.0) -> None:
    """Trains the ControlNet of the model `models/name` and writes it to `out/canny-name`."""
    base = load_base(FAMILIES[name], models / name)
    pictures = gallery(base.vae, max(8, round(PICTURES * scale)), work / "edges")
    plan = replace(PLANS[name], steps=max(2, round(PLANS[name].steps * scale)))
    batch = BATCH if scale > 0.1 else 2
    net = train_controlnet(base, pictures, plan, batch=batch, folder=work, device=device)
    export(net, out / f"canny-{name}")


def export(net: ControlNetModel, folder: Path) -> None:
    """Replaces `folder` with the network in fp16, in diffusers' layout; a reader never sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        written = Path(temporary) / folder.name
        net.cpu().half().save_pretrained(written)
        forget_where_it_was_made(written)
        for path in written.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors leaves them to the owner alone
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        shutil.move(written, folder)
