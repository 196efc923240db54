"""`heliograph store`: what is kept of results, and what is removed."""

import typer

from app.config_option import CONFIG, Config, console

store_app = typer.Typer(no_args_is_help=True, help="The pictures that are kept.")


@store_app.callback()
def store() -> None:
    """The pictures that are kept."""


@store_app.command()
def sweep(config: Config = CONFIG) -> None:
    """Remove results whose time is over, and stored pictures older than a day that nobody owns.

    May run at any time, beside the server. What it does not reach today it removes the next time.
    """
    from app import deployment
    from app.database import perform
    from app.results import results

    gateway = deployment.read(config)[0].gateway
    swept = perform(gateway.database, lambda database: results.opened(gateway, database).keep_house(), new=False)
    console.print(f"removed {swept.results} results and {swept.objects} stored objects without an owner")
