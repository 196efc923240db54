"""Makes the embedded ControlNets again: `python -m models.embedded.controlnets --help`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from models.embedded.controlnets.agreement import publish
from models.embedded.controlnets.recipe import PLANS, make

Name = StrEnum("Name", list(PLANS))
Device = StrEnum("Device", ["auto", "cpu", "cuda"])


def main(
    only: Annotated[list[Name] | None, typer.Option(help="Train only this base's ControlNet; may be repeated.")] = None,
    models: Annotated[Path, typer.Option(help="Where the base models' folders are.")] = Path("models/embedded"),
    out: Annotated[Path, typer.Option(help="Where the ControlNets' folders are written.")] = Path(
        "models/embedded/controlnets"
    ),
    work: Annotated[Path, typer.Option(help="Checkpoints and encoded pictures; a run resumes here.")] = Path(
        ".training"
    ),
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = Device.auto,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    scale: Annotated[float, typer.Option(help="Of all numbers; 0.002 is a test of the machinery.")] = 1.0,
    scenes: Annotated[int, typer.Option(help="Held-out scenes to score afterwards; 0 for none.")] = 0,
) -> None:
    """Trains one canny ControlNet for each base model. Stop it at any time: it resumes.

    With `--scenes 50` it then prints the table of edge agreement and writes the contact sheet into `out`.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # the moments of weights at rest are denormal, and CPUs are slow at those
    cuda = device is Device.cuda or (device is Device.auto and torch.cuda.is_available())
    for name in only or list(Name):
        make(str(name), models, out, work, device=torch.device("cuda" if cuda else "cpu"), scale=scale)
    if scenes:
        publish(models, out, scenes)


if __name__ == "__main__":
    typer.run(main)
