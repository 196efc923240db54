"""Makes the embedded upscalers again from nothing and scores them: `python -m models.embedded.upscalers --help`."""

from pathlib import Path
from typing import Annotated

import typer

from models.embedded.options import WORK, Scale, Work, set_up_training
from models.embedded.upscalers.scores import report
from models.embedded.upscalers.training import SCALES, make

HERE = Path(__file__).parent


def main(
    only: Annotated[list[int] | None, typer.Option(help="Train only this factor (2 or 4); may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Where the weights, the table and the sheet are written.")] = HERE,
    work: Work = WORK,
    share: Scale = 1.0,
    pictures: Annotated[int, typer.Option(help="Held-out pictures to score on.")] = 100,
) -> None:
    """Trains each upscaler on pictures of the embedded models' world, on one thread, and compares it with Lanczos.

    Stop it at any time: it resumes. A finished training only loads, so a second run scores again.
    """
    set_up_training(threads=1)
    out.mkdir(parents=True, exist_ok=True)
    for scale in only or SCALES:
        make(scale, out / f"{scale}x.safetensors", folder=work, share=share)
    print(report(out, SCALES, pictures))


if __name__ == "__main__":
    typer.run(main)
