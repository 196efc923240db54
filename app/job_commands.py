"""`heliograph jobs`: the jobs of a server, listed, shown, ended and tried again."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from app.server_option import ADDRESS, Address

jobs_app = typer.Typer(no_args_is_help=True, help="Jobs of a server: what `generate --async` makes.")

Id = Annotated[str, typer.Argument(help="From `heliograph jobs list`.")]


@jobs_app.command("list")
def list_jobs(
    status: Annotated[
        str | None, typer.Option(help="queued, running, succeeded, failed, cancelled, expired; several with commas.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only those of a model.")] = None,
    kind: Annotated[str | None, typer.Option(help="generate, img2img, inpaint, outpaint, variations, upscale.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most, up to 200.")] = 20,
    address: Address = ADDRESS,
) -> None:
    """The newest jobs: what has become of each, and how long it took."""
    from rich.console import Console
    from rich.table import Column, Table

    from app.client import Client

    whole = Column("job", no_wrap=True, min_width=32)  # an id is for the next command: never cut short
    table = Table(whole, "status", "model", "kind", "submitted", "seconds", "images", "attempt")
    wanted = {"status": status, "model": model, "kind": kind, "limit": limit}
    for job in Client(address).jobs({name: value for name, value in wanted.items() if value is not None}):
        table.add_row(job["job_id"], *_row(job))
    Console().print(table)


@jobs_app.command()
def show(
    id: Id,
    wait: Annotated[int | None, typer.Option(help="Wait so many seconds for its end, 60 at most.")] = None,
    address: Address = ADDRESS,
) -> None:
    """All that is known of a job, as JSON."""
    from app.client import Client

    _print(Client(address).job(id, wait))


@jobs_app.command()
def cancel(id: Id, address: Address = ADDRESS) -> None:
    """End a job, whether it waits or runs. One that has ended stays as it is."""
    from app.client import Client

    _print(Client(address).cancel_job(id))


@jobs_app.command()
def retry(id: Id, address: Address = ADDRESS) -> None:
    """Try a failed, cancelled or expired job again, as another job."""
    from app.client import Client

    _print(Client(address).retry_job(id))


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    submitted = f"{datetime.fromtimestamp(job['created_at'], UTC):%Y-%m-%d %H:%M:%S}"
    ended = job["finished_at"] or time.time()
    seconds = "" if job["started_at"] is None else f"{max(0.0, ended - job['started_at']):.1f}"
    return job["status"], job["model"], job["kind"], submitted, seconds, str(len(job["images"])), str(job["attempt"])


def _print(job: dict[str, Any]) -> None:
    from rich.console import Console

    Console().print_json(data=job)
