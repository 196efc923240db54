"""The option of every command that speaks to a server."""

from typing import Annotated

import typer

ADDRESS = "http://127.0.0.1:8000"
Address = Annotated[str, typer.Option("--address", "-a", envvar="HELIOGRAPH_URL", help="Where a server answers.")]
