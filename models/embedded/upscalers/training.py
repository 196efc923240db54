"""A small Compact network (Real-ESRGAN's, arXiv:2107.10833) learns to undo the shrinking of the world's pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from models.embedded.drawing import render
from models.embedded.training import Dice, Plan, train
from models.embedded.world import training_scene
from models.esrgan import Compact

SCALES = (2, 4)
FEATURES, LAYERS = 24, 6
SIDES = (96, 128, 192, 256, 384)  # of the pictures; the larger ones show their edges as photographs of edges do
PICTURES = 600
PATCH = 20  # pixels of the small picture
BATCH = 12
CANDIDATES = 4  # places of which the liveliest is taken: the plain background teaches little
SHRINKINGS = (Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
PLANS = {
    2: Plan(name="upscaler_2x", steps=8000, learning_rate=2e-3, weight_decay=0.0),
    4: Plan(name="upscaler_4x", steps=16000, learning_rate=2e-3, weight_decay=0.0),
}


def make(scale: int, path: Path, *, folder: Path, share: float = 1.0) -> None:
    """Trains the upscaler of that factor, from `folder`'s checkpoint where there is one, and writes it in fp16."""
    plan = replace(PLANS[scale], steps=max(2, round(PLANS[scale].steps * share)))
    torch.manual_seed(plan.seed)
    pictures = gallery(max(4, round(PICTURES * min(1.0, share))), np.random.default_rng([plan.seed, scale]))

    def loss(step: int, dice: Dice) -> Tensor:
        small, large = pairs(pictures, scale, dice.numpy)
        error = learner(small) - large
        # Sharp edges first; then what PSNR measures, which pulls each edge to its place.
        return charbonnier(error) if step < plan.steps / 2 else 100 * (error**2).mean()

    learner = started(Compact(FEATURES, LAYERS, scale))
    trained = train(learner, plan, loss, folder=folder, device=torch.device("cpu"))
    save_file({name: tensor.half().contiguous() for name, tensor in trained.state_dict().items()}, path)
    path.chmod(0o644)  # safetensors leaves it to the owner alone


def started(net: Compact) -> Compact:
    """Initial weights with which it begins as what its skip connection is: the nearest pixel."""
    last = net.body[-1]
    assert isinstance(last, nn.Conv2d)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return net


def charbonnier(difference: Tensor) -> Tensor:
    """Nearly the absolute difference, but smooth at zero (Charbonnier et al. 1994)."""
    return (difference**2 + 1e-6).sqrt().mean()


def gallery(count: int, rng: np.random.Generator) -> list[Image.Image]:
    """Pictures that training may see, at several sizes."""
    return [render(training_scene(rng), rng, size=int(rng.choice(SIDES))) for _ in range(count)]


def pairs(pictures: list[Image.Image], scale: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Inputs, (BATCH, 3, PATCH, PATCH), and what they were shrunk from, (BATCH, 3, PATCH * scale, PATCH * scale)."""
    large = [patch(pictures[rng.integers(len(pictures))], PATCH * scale, rng) for _ in range(BATCH)]
    small = [picture.resize((PATCH, PATCH), SHRINKINGS[rng.integers(len(SHRINKINGS))]) for picture in large]
    return batch(small), batch(large)


def patch(picture: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """The liveliest of a few places, turned, and with its colours exchanged: no colour is special to an edge."""
    found = []
    for _ in range(CANDIDATES):
        x, y = rng.integers(0, picture.width - side + 1, 2)
        found.append(np.asarray(picture.crop((x, y, x + side, y + side))))
    liveliest = max(found, key=lambda pixels: float(pixels[::3, ::3].std(axis=(0, 1)).sum()))
    turned = np.rot90(liveliest, rng.integers(4))
    flipped = turned[:, ::-1] if rng.integers(2) else turned
    return Image.fromarray(np.ascontiguousarray(flipped[..., rng.permutation(3)]))


def batch(pictures: list[Image.Image]) -> Tensor:
    """(n, 3, h, w) in 0 to 1."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255
