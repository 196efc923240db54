"""`python -m bench`: the benchmark's command line."""

import asyncio
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.plan import Plan
from bench.progress import telling


class Contenders(StrEnum):
    """Who can be measured besides B0, which everything is measured against."""

    GROUPED = "B1"
    ENGINE = "E"
    SERVER = "H"


class Names(StrEnum):
    """The workloads."""

    EQUAL = "equal"
    STEPS = "steps"
    SIZES = "sizes"


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run of a few minutes; its figures mean little.")
    ] = False,
    only: Annotated[
        list[Contenders] | None, typer.Option(help="Measure only this one besides B0; may be repeated.")
    ] = None,
    workload: Annotated[list[Names] | None, typer.Option(help="Only this workload; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the requests, their order and their arrivals.")] = 1,
    threads: Annotated[int, typer.Option(help="torch threads, for everyone alike.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.md.")] = Path("out/bench"),
    publish: Annotated[bool, typer.Option("--publish", help="Also put the tables into bench/README.md.")] = False,
) -> None:
    """Measure Heliograph against what a user would pick instead: diffusers alone (B0) and under @serve.batch (B1).

    E is the engine in this process, H the whole application through HTTP. Everything runs here, one after another, on
    the embedded sd15 in float32; bench/README.md says how and why.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it tells of optional packages whenever it is imported
    from bench import readme, report  # imported here because torch takes seconds and --help needs none
    from bench.experiment import Experiment

    plan = Plan.make(
        quick=quick, contenders=list(only or Contenders), workloads=list(workload or []), seed=seed, threads=threads
    )
    console = Console()
    with telling(console) as say:
        command = " ".join(["python -m bench", *sys.argv[1:]])
        experiment = Experiment(plan, command, say)
        try:
            asyncio.run(experiment.run())
        finally:  # what was measured before a contender failed is worth keeping
            report.write(experiment.results, out)
    report.show(experiment.results, console)
    if publish:
        readme.publish("measured", report.markdown(experiment.results))


if __name__ == "__main__":
    typer.run(main)
