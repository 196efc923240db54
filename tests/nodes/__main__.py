"""`python -m tests.nodes`: everything that may befall a cluster, each thing once, under load."""

import asyncio
import signal
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.scale import high_throughput as profile
from tests.nodes.composed import draw_and_work
from tests.nodes.load import Span
from tests.nodes.run import FAULTS, REPLICAS, run


def main(
    fault: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(FAULTS)}; all unless said.")] = None,
    clients: Annotated[int, typer.Option(help="That draw at a time, for each model.")] = 2,
    composed: Annotated[bool, typer.Option("--composed", help="What compose.yaml deploys, and no fault.")] = False,
    high_throughput: Annotated[bool, typer.Option("--high-throughput", help="With HAProxy in front.")] = False,
) -> None:
    """Start a cluster of its own and see whether any request fails. Ends with status 1 where one does."""
    unknown = set(fault or ()) - FAULTS.keys()
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: must be one of {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it wants the nodes gone as well
    if composed:
        asyncio.run(draw_and_work())
        return
    spans = asyncio.run(run(fault or tuple(FAULTS), clients=clients, environment=profile() if high_throughput else {}))
    console = Console()
    console.print(table(spans))
    failed = [answer for span in spans.values() for answer in span.failed]
    for answer in failed:
        console.print(f"{answer.model} failed after {answer.ended - answer.began:.1f} s: {answer.fault}")
    sys.exit(1 if failed else 0)


def table(spans: dict[str, Span]) -> Table:
    """A row for each fault."""
    shown = Table("fault", "seconds", "requests", "failed", *(f"longest gap of {model}, s" for model in REPLICAS))
    for name, span in spans.items():
        gaps = [f"{span.longest_gap_s(model):.1f}" for model in REPLICAS]
        shown.add_row(name, f"{span.seconds:.0f}", str(len(span.answers)), str(len(span.failed)), *gaps)
    return shown


if __name__ == "__main__":
    typer.run(main)
