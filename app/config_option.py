"""The option of every command that reads a configuration, and where such commands tell what they have done."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

CONFIG = Path("serve_config.yaml")
Config = Annotated[Path, typer.Option("--config", "-c", help="The configuration: models, database, store, secret.")]

console = Console(stderr=True)
