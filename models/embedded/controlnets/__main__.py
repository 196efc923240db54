"""Makes the embedded ControlNets again: `python -m models.embedded.controlnets --help`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from models.embedded.controlnets.agreement import publish
from models.embedded.controlnets.recipe import PLANS, make
from models.embedded.options import MODELS, WORK, Device, Models, On, Scale, Threads, Work, set_up_training

Name = StrEnum("Name", list(PLANS))


def main(
    only: Annotated[list[Name] | None, typer.Option(help="Train only this base's ControlNet; may be repeated.")] = None,
    models: Models = MODELS,
    out: Annotated[Path, typer.Option(help="Where the ControlNets' folders are written.")] = MODELS / "controlnets",
    work: Work = WORK,
    device: On = Device.auto,
    threads: Threads = 1,
    scale: Scale = 1.0,
    scenes: Annotated[int, typer.Option(help="Held-out scenes to score afterwards; 0 for none.")] = 0,
) -> None:
    """Trains one canny ControlNet for each base model. Stop it at any time: it resumes.

    With `--scenes 50` it then prints the table of edge agreement and writes the contact sheet into `out`.
    """
    place = set_up_training(threads, device)
    for name in only or list(Name):
        make(str(name), models, out, work, device=place, scale=scale)
    if scenes:
        publish(models, out, scenes)


if __name__ == "__main__":
    typer.run(main)
