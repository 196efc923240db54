"""What the ControlNets learn from: pictures whose captions do not tell the place, latents and edges of each."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.embedded.autoencoder import signed
from models.embedded.drawing import pixels, render
from models.embedded.latents import read_shard
from models.embedded.world import RELATIONS, Scene, Thing, training_scene
from models.preprocessors.canny import apply as canny

SHARD = 500  # pictures
FREE_SHARE = 0.85  # of the pictures; the others stand where the base model would put them anyway
REACH = 1.15  # of the radius: the star's corners, with a little air
GAP = 0.04  # of the picture's side, between things and at the rim


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures: scenes, latents of mean 0 and spread 1, (n, 4, 16, 16), and edges of 0 and 1, (n, 1, 128, 128)."""

    latents: Tensor
    edges: Tensor
    scenes: list[Scene]


def moved(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with its things anywhere and of any size, and without the words for that; a relation stays true."""
    sizes = (0.15, 0.34) if len(scene.things) == 1 else (0.14, 0.19)
    while True:
        radius = rng.uniform(*sizes)
        low, high = REACH * radius + GAP, 1 - REACH * radius - GAP
        at = rng.uniform(low, high, (len(scene.things), 2))
        things = tuple(
            replace(thing, x=float(x), y=float(y), radius=float(radius))
            for thing, (x, y) in zip(scene.things, at, strict=True)
        )
        if apart(things) and related(things, scene.relation):
            return replace(scene, things=things, place="", size="")


def apart(things: tuple[Thing, ...]) -> bool:
    """Whether no two of them touch."""
    pairs = [(a, b) for i, a in enumerate(things) for b in things[:i]]
    return all(np.hypot(a.x - b.x, a.y - b.y) > REACH * (a.radius + b.radius) + GAP for a, b in pairs)


def related(things: tuple[Thing, ...], relation: str) -> bool:
    """Whether the first stands to the second as the caption says, clearly and more so than across."""
    if relation not in RELATIONS:
        return True
    (x0, y0), (x1, y1) = RELATIONS[relation]
    along, across = things[1].x - things[0].x, things[1].y - things[0].y
    if x0 == x1:
        along, across = across, along
    return along * np.sign(x1 - x0 + y1 - y0) > max(0.2, abs(across))


def gallery(vae: AutoencoderKL, count: int, folder: Path) -> Gallery:
    """Loads what an earlier run left in `folder`, and draws and encodes the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.safetensors" for i in range(-(-count // SHARD))]
    for path in track(paths, description="pictures with edges"):
        if not path.exists():
            write_shard(path, vae, min(SHARD, count))
    read = [read_shard(path) for path in paths]
    return Gallery(
        latents=torch.cat([latents for latents, _ in read]).float()[:count],
        edges=torch.cat([read_edges(path) for path in paths])[:count],
        scenes=[scene for _, scenes in read for scene in scenes][:count],
    )


@torch.no_grad()
def write_shard(path: Path, vae: AutoencoderKL, count: int) -> None:
    """Draws and encodes `count` pictures; the shard's number is its seed."""
    rng = np.random.default_rng([int(path.stem), 5])
    scenes = [training_scene(rng) for _ in range(count)]
    scenes = [moved(scene, rng) if rng.random() < FREE_SHARE else scene for scene in scenes]
    pictures = np.stack([pixels(render(scene, rng)) for scene in scenes])
    with torch.autocast("cpu", torch.bfloat16):
        batches = torch.from_numpy(pictures).split(20)
        latents = torch.cat([vae.encode(signed(some)).latent_dist.mean for some in batches]) * vae.config.scaling_factor
    edges = np.stack([canny(picture.transpose(1, 2, 0))[..., 0] for picture in pictures]) > 0
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    save_file(
        {"latents": latents.half().contiguous(), "edges": torch.from_numpy(np.packbits(edges, -1))},
        temporary,
        metadata={"scenes": json.dumps([asdict(scene) for scene in scenes])},
    )
    os.replace(temporary, path)


def read_edges(path: Path) -> Tensor:
    """(count, 1, 128, 128) of 0 and 1, uint8."""
    with safe_open(path, "pt") as file:
        return torch.from_numpy(np.unpackbits(file.get_tensor("edges").numpy(), axis=-1))[:, None]
