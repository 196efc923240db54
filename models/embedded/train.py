"""Makes the embedded models again from nothing: `python -m models.embedded.train --help`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from models.embedded.architecture import FAMILIES
from models.embedded.recipe import Recipe

Name = StrEnum("Name", list(FAMILIES))
Device = StrEnum("Device", ["auto", "cpu", "cuda"])


def main(
    only: Annotated[list[Name] | None, typer.Option(help="Train only this model; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Where the models' folders are written.")] = Path("models/embedded"),
    work: Annotated[Path, typer.Option(help="Checkpoints and encoded pictures; a run resumes here.")] = Path(
        ".training"
    ),
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = Device.auto,
    threads: Annotated[int, typer.Option(help="CPU threads of the training itself.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that draw and encode pictures.")] = 2,
    scale: Annotated[float, typer.Option(help="Of all numbers of steps; 0.001 is a test of the machinery.")] = 1.0,
    prepare: Annotated[bool, typer.Option("--prepare", help="Stop after what the three share.")] = False,
) -> None:
    """Draws captioned pictures and trains the embedded models on them. Stop it at any time: it resumes.

    The stages: one autoencoder for all, the text encoders, the pictures encoded, and the UNets. To use two CPU cores,
    run `--prepare` once and then `--only sd15 --only sd21` and `--only sdxl` side by side.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # the moments of weights at rest are denormal, and CPUs are slow at those
    cuda = device is Device.cuda or (device is Device.auto and torch.cuda.is_available())
    recipe = Recipe(folder=work, device=torch.device("cuda" if cuda else "cpu"), scale=scale, workers=workers)
    if prepare:
        recipe.reader(FAMILIES["sd15"])
        recipe.gallery()
        return
    for name in only or list(Name):
        recipe.make(str(name), out)


if __name__ == "__main__":
    typer.run(main)
