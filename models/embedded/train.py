"""Makes the embedded models again from nothing: `python -m models.embedded.train --help`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from models.embedded.architecture import FAMILIES
from models.embedded.options import MODELS, WORK, Device, On, Scale, Threads, Work, set_up_training
from models.embedded.recipe import Recipe

Name = StrEnum("Name", list(FAMILIES))


def main(
    only: Annotated[list[Name] | None, typer.Option(help="Train only this model; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Where the models' folders are written.")] = MODELS,
    work: Work = WORK,
    device: On = Device.auto,
    threads: Threads = 1,
    workers: Annotated[int, typer.Option(help="Processes that draw and encode pictures.")] = 2,
    scale: Scale = 1.0,
    prepare: Annotated[bool, typer.Option("--prepare", help="Stop after what the three share.")] = False,
) -> None:
    """Draws captioned pictures and trains the embedded models on them. Stop it at any time: it resumes.

    The stages: one autoencoder for all, the text encoders, the pictures encoded, and the UNets. To use two CPU cores,
    run `--prepare` once and then `--only sd15 --only sd21` and `--only sdxl` side by side.
    """
    recipe = Recipe(folder=work, device=set_up_training(threads, device), scale=scale, workers=workers)
    if prepare:
        recipe.reader(FAMILIES["sd15"])
        recipe.gallery()
        return
    for name in only or list(Name):
        recipe.make(str(name), out)


if __name__ == "__main__":
    typer.run(main)
