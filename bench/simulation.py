"""`python -m bench.simulation`: serves a configuration whose models are simulated, as `heliograph serve` a real one."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from app import local
from app.deployment import MODEL_IMPORT, Deployment
from app.settings import ModelSettings, set_ray_environment

SIMULATED_IMPORT = "bench.simulated:model"
# Of a simulated model, where nothing else is said: 16 rows, which are 8 pictures with guidance, are a replica's batch.
SECONDS = {"forward_s": 0.02, "row_s": 0.01, "picture_s": 0.02}
MAX_ROWS = 16
PACE = f"a forward takes {SECONDS['forward_s']:g} s and {SECONDS['row_s']:g} s for each of at most {MAX_ROWS} rows"
SIMULATION = ("-m", "bench.simulation")  # arguments of Python, as bench.serving's are

Args = dict[str, Any]
Times = Mapping[str, float]  # forward_s, row_s, picture_s of bench.simulated.SimulatedSettings


def simulated(config: dict[str, Any], times: Mapping[str, Times]) -> dict[str, Any]:
    """A server's configuration in which the models that are named only take these times; the others stay real."""
    return _exchanged(
        config, lambda args: args.get("name") in times, SIMULATED_IMPORT, lambda args: {**args, **times[args["name"]]}
    )


def real(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with all models real, which the server's own checks can read."""

    def without_times(args: Args) -> Args:
        return {key: value for key, value in args.items() if key in ModelSettings.model_fields}

    return _exchanged(config, lambda _: True, MODEL_IMPORT, without_times)


def _exchanged(
    config: dict[str, Any], chosen: Callable[[Args], bool], runs: str, args_of: Callable[[Args], Args]
) -> dict[str, Any]:
    """The configuration with another import path, and other args, for the chosen applications of models."""
    applications = [
        one | {"import_path": runs, "args": args_of(one["args"])}
        if one["import_path"] in (MODEL_IMPORT, SIMULATED_IMPORT) and chosen(one["args"])
        else one
        for one in config["applications"]
    ]
    return config | {"applications": applications}


def main(
    config: Annotated[Path, typer.Option(help="A configuration of Serve.")],
    port: Annotated[int, typer.Option(help="Where to listen.")],
    environment: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, for Ray; may be repeated.")] = None,
) -> None:
    """Serve the configuration on this machine until SIGTERM."""
    # Before anything imports Ray, which reads its environment then.
    os.environ.update({name: value for name, _, value in (each.partition("=") for each in environment or [])})
    set_ray_environment()
    raw = yaml.safe_load(config.read_text())
    raw |= {"http_options": raw.get("http_options", {}) | {"port": port}}
    try:
        with local.running(Deployment.model_validate(real(raw)), raw, lambda _: None) as running:
            print(f"serve status -a {running.dashboard}", flush=True)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    typer.run(main)
