"""`heliograph store`: what is kept of results, and what is removed."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from app.results.results import Swept
    from app.settings import GatewaySettings

store_app = typer.Typer(no_args_is_help=True, help="The pictures that are kept.")
console = Console(stderr=True)

Config = Annotated[Path, typer.Option("--config", "-c", help="The configuration that names database and store.")]
DEFAULT_CONFIG = Path("serve_config.yaml")


@store_app.callback()
def store() -> None:
    """The pictures that are kept."""


@store_app.command()
def sweep(config: Config = DEFAULT_CONFIG) -> None:
    """Remove results whose time is over, and stored pictures older than a day that nobody owns.

    May run at any time, beside the server. What it does not reach today it removes the next time.
    """
    from app import deployment

    gateway = deployment.read(config)[0].gateway
    swept = asyncio.run(_swept(gateway))
    console.print(f"removed {swept.results} results and {swept.objects} stored objects without an owner")


async def _swept(gateway: "GatewaySettings") -> "Swept":
    from app.database import Database
    from app.results import results

    database = Database(gateway.database)
    try:
        await database.migrate()
        return await results.opened(gateway, database).keep_house()
    finally:
        await database.close()
