"""`python -m tests.faults`: breaks a real server again and again, and says whether every promise was kept."""

import asyncio
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tests.faults import checker, log, report
from tests.faults.log import FaultKind
from tests.faults.plan import KILLS, planned
from tests.faults.run import Run, run
from tests.faults.story import Story

Database = StrEnum("Database", ["sqlite", "postgresql"])
Store = StrEnum("Store", ["folder", "s3"])


def main(
    faults: Annotated[int, typer.Option(help="How many, in all.", min=0)] = 200,
    jobs: Annotated[int, typer.Option(help="How many, at a steady rate.", min=1)] = 500,
    database: Annotated[Database, typer.Option(help="What keeps the jobs.")] = Database.sqlite,
    store: Annotated[Store, typer.Option(help="What keeps the pictures; s3 also answers with errors.")] = Store.folder,
    seed: Annotated[int, typer.Option(help="Decides everything that is asked for and broken.", min=0)] = 1,
    every_s: Annotated[float, typer.Option("--every", help="Seconds between faults, about.", min=0.1)] = 6.0,
    outage_s: Annotated[float, typer.Option("--outage", help="The longest outage in seconds.", min=1.0)] = 30.0,
    rest_s: Annotated[float, typer.Option("--rest", help="Seconds between two outages, at least.", min=0.0)] = 15.0,
    out: Annotated[Path | None, typer.Option(help="A new folder for the log; a temporary one unless said.")] = None,
    check: Annotated[Path | None, typer.Option(help="Only checks the log of an earlier run.")] = None,
) -> None:
    """Start a server of its own, submit jobs, inject faults, and check the invariants over the log.

    Ends with status 1 where one is violated. Ctrl-C stops everything that was started.
    """
    console = Console()
    if check is None:
        kinds: tuple[FaultKind, ...] = (*KILLS, "database", "disk", *(("store",) if store is Store.s3 else ()))
        plan = planned(seed, jobs, faults, kinds, every_s, outage_s, rest_s)
        if out is not None:
            out.mkdir(parents=True)
        folder = (out or Path(tempfile.mkdtemp(prefix="heliograph-faults-"))).resolve()
        wanted = Run(plan=plan, database=database, store=store, folder=folder)
        check = wanted.log
        console.print(f"the log is {check}", soft_wrap=True)
        try:
            asyncio.run(run(wanted, console))
        except asyncio.CancelledError:
            console.print("stopped")
            sys.exit(130)
    story = Story.of(log.read(check))
    violations = checker.check(story)
    report.show(console, story, violations)
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    typer.run(main)
