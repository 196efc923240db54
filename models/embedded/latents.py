"""The third stage: captioned pictures drawn and encoded once, for all three UNets to learn from."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.embedded import architecture
from models.embedded.autoencoder import signed
from models.embedded.drawing import pixels, render
from models.embedded.world import Scene, Thing, training_scene

SHARD = 500  # pictures


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Training pictures as latents of mean 0 and spread 1, (pictures, 4, 16, 16), beside their scenes."""

    latents: Tensor
    scenes: list[Scene]


def gallery(vae: AutoencoderKL, count: int, *, folder: Path, workers: int) -> Gallery:
    """Loads what an earlier run left in `folder`, and draws and encodes the rest in `workers` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "autoencoder.safetensors"
    if not weights.exists():
        save_file({name: t.contiguous().cpu() for name, t in vae.state_dict().items()}, weights)
    shards = [folder / f"{i:03}.safetensors" for i in range(-(-count // SHARD))]
    missing = [path for path in shards if not path.exists()]
    if missing:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(write_shard, missing, [weights] * len(missing), [min(SHARD, count)] * len(missing)))
    read = [read_shard(path) for path in shards]
    latents = torch.cat([latents for latents, _ in read]).float()
    return Gallery(latents=latents[:count], scenes=[scene for _, scenes in read for scene in scenes][:count])


@torch.no_grad()
def write_shard(path: Path, weights: Path, count: int) -> None:
    """Draws and encodes `count` pictures; the shard's number is its seed."""
    torch.set_num_threads(1)
    vae = architecture.autoencoder().eval().to(memory_format=torch.channels_last)
    with safe_open(weights, "pt") as file:
        vae.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    rng = np.random.default_rng([int(path.stem), 3])
    scenes = [training_scene(rng) for _ in range(count)]
    pictures = torch.from_numpy(np.stack([pixels(render(scene, rng)) for scene in scenes]))
    with torch.autocast("cpu", torch.bfloat16):
        encoded = [vae.encode(signed(some)).latent_dist.mean for some in pictures.split(20)]
    temporary = path.with_suffix(".partial")
    save_file(
        {"latents": torch.cat(encoded).half().contiguous()},
        temporary,
        metadata={"scenes": json.dumps([asdict(scene) for scene in scenes])},
    )
    os.replace(temporary, path)


def read_shard(path: Path) -> tuple[Tensor, list[Scene]]:
    """The latents (count, 4, 16, 16) of one shard, and the scenes."""
    with safe_open(path, "pt") as file:
        scenes = json.loads(file.metadata()["scenes"])
        latents = file.get_tensor("latents")
    return latents, [
        Scene(**dict(scene, things=tuple(Thing(**thing) for thing in scene["things"]))) for scene in scenes
    ]
