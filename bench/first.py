"""`python -m bench.first`: a fresh process that loads a model, draws its first picture, and says when.

It prints a word on a line of its own as it gets there: `imported`, `loaded`, `warm` when what a replica does before it
takes requests is done, `drawn`, and `compiled` when the network has been compiled and a picture was drawn by it.
bench.cold reads the clock.
"""

import os
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

STEPS = 20


def main(
    model: Annotated[str, typer.Option(help="Its name in bench/fullsize.py.")],
    source: Annotated[str, typer.Option(help="A diffusers folder.")],
    side: Annotated[int, typer.Option(help="Of the pictures.")],
    device: Annotated[str, typer.Option()],
    dtype: Annotated[str, typer.Option()],
    measured: Annotated[Path, typer.Option(help="Where what is measured is kept.")],
    graphs: Annotated[bool, typer.Option()] = False,
    compiled: Annotated[Path | None, typer.Option(help="Where what is compiled is kept.")] = None,
) -> None:
    for package in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{package}_VERBOSITY", "error")
    from bench.assembled import card
    from bench.fullsize import NETWORKS
    from bench.pipeline import hide_progress
    from bench.workloads import RequestClass, request_of
    from models import families
    from models.captured import LASTING
    from models.engine import Engine

    hide_progress()
    _say("imported")
    network = NETWORKS[model]
    family = families.load(
        family=network.family, source=source, device=device, dtype=dtype, graphs=graphs, compiled=compiled
    )
    engine = Engine(family, card(network, side))
    _say("loaded")
    engine.warm_up(kept=measured)
    _say("warm")
    request = request_of(RequestClass(side, STEPS), 1, network.name)
    engine.generate([request])
    _say("drawn")
    if compiled is None:
        return
    captured = engine.captured
    assert captured is not None, "it runs what is compiled"
    for drawn in count():
        settled = captured.settled()
        engine.generate([request])
        if captured.compiled_kinds:
            break
        if settled and drawn * STEPS > LASTING:
            return  # it could not be compiled
    engine.generate([request])
    _say("compiled")


def _say(what: str) -> None:
    print(what, flush=True)


if __name__ == "__main__":
    typer.run(main)
