"""The command line. Heavy imports wait until a command needs them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from app.config_option import CONFIG, Config, console
from app.experiment_commands import experiments_app
from app.job_commands import jobs_app
from app.keys.cli import keys_app
from app.options import read_picture, to_body, with_options
from app.results.cli import store_app
from app.server_option import ADDRESS, Address
from app.webhooks.cli import webhooks_app
from models.errors import HeliographError, InvalidRequest

if TYPE_CHECKING:
    from models.images import ImageFormat

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Stable Diffusion served on Ray Serve.",
)
models_app = typer.Typer(no_args_is_help=True, help="What the models are and what each can do.")
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(jobs_app, name="jobs")
app.add_typer(webhooks_app, name="webhooks")
app.add_typer(store_app, name="store")
app.add_typer(experiments_app, name="experiments")

Local = Annotated[bool, typer.Option("--local", help="Without a server, from the configuration alone.")]


def main() -> None:
    """Runs a command; an error of ours is one line that says what to do."""
    try:
        app()
    except HeliographError as error:
        console.print("error", error, style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def serve(
    config: Config = CONFIG,
    host: Annotated[str | None, typer.Option(help="Overrides the configuration's http_options.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Overrides the configuration's http_options.port.")] = None,
) -> None:
    """Start Ray and every application of the configuration here, until Ctrl-C.

    Ray's own ports are on 127.0.0.1 and guarded by a token unless RAY_AUTH_MODE says otherwise.
    """
    from app import settings

    settings.set_ray_environment()
    from app import deployment, local

    described, raw = deployment.read(config)
    override = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    http_options = deployment.HttpOptions.model_validate(described.http_options.model_dump() | override)
    described = described.model_copy(update={"http_options": http_options})
    started = time.monotonic()
    try:
        status = console.status("starting")
        with status, local.running(described, raw, status.update) as running:
            status.stop()
            _greet(running, described.catalogue.default_model, time.monotonic() - started)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        console.print("stopped")


def _greet(running: Any, model: str, seconds: float) -> None:
    from app import settings

    body = '{"prompt": "a red circle on a blue background", "seed": 7}'
    auth = "RAY_AUTH_MODE=token " if settings.ray_auth_mode() == "token" else ""
    lines = [
        f"Heliograph is ready at [bold]{running.address}[/] after {seconds:.0f} s (model {model}). Try:",
        "",
        f"  curl -sS {running.address}/v1/generate -H 'Accept: image/png' -o out.png \\",
        f"    -d '{body}'",
        "",
        f"API: {running.address}/docs   Serve: {auth}serve status -a {running.dashboard}   Stop: Ctrl-C",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


@app.command()
@with_options
def generate(
    prompt: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="Several pictures become NAME-0.png, ...")] = Path(
        "out.png"
    ),
    address: Address = ADDRESS,
    local: Local = False,
    asynchronous: Annotated[
        bool, typer.Option("--async", help="Print a job's id at once; the server draws and keeps the pictures.")
    ] = False,
    config: Config = CONFIG,
    **options: Any,
) -> None:
    """Draw PROMPT, through a server or with --local.

    The picture's format is the file's: .png, .jpg, .webp or .avif.
    """
    body = {"prompt": prompt, "output_format": _format(output)} | to_body(options)
    if asynchronous:
        _submit(body, local, address)
        return
    _save(_generate(body, address, local, config), output)


def _submit(body: dict[str, Any], local: bool, address: str) -> None:
    from app import client

    if local:
        raise InvalidRequest("async", "needs a server: leave out --local")
    print(client.Client(address).submit(body)["job_id"])


def _generate(body: dict[str, Any], address: str, local: bool, config: Path) -> Iterator[Any]:
    from app import client

    if not local:
        return client.Client(address).generate(body)
    from app import deployment

    catalogue = deployment.read(config)[0].catalogue
    name = body.get("model", catalogue.default_model)
    settings = next((settings for settings in catalogue.models if settings.name == name), None)
    if settings is None:
        raise InvalidRequest("model", f"there is no {name!r}; one of: {', '.join(m.name for m in catalogue.models)}")
    return client.generate_locally(settings, body)


def _save(events: Iterator[Any], output: Path) -> None:
    """Writes the pictures when all are there, since their names say how many; a bar for each counts its steps."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from models.events import Finished

    pictures: list[Finished] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[int, Any] = {}
        for event in events:
            if isinstance(event, Finished):
                pictures.append(event)
                continue
            if event.index not in tasks:
                tasks[event.index] = bar.add_task(f"picture {event.index}", total=event.steps)
            bar.update(tasks[event.index], completed=event.step)
    for picture in sorted(pictures, key=lambda picture: picture.index):
        path = output if len(pictures) == 1 else output.with_stem(f"{output.stem}-{picture.index}")
        path.write_bytes(picture.data)
        console.print(f"{path}: {picture.width}x{picture.height}, seed {picture.seed}", highlight=False)


def _format(output: Path) -> "ImageFormat":
    formats: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".avif": "avif"}
    if output.suffix.lower() not in formats:
        raise InvalidRequest("output", f"must end in one of {', '.join(formats)}, not {output.suffix!r}")
    return formats[output.suffix.lower()]


@app.command()
def upscale(
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG, WebP or AVIF; a transparent one stays so.")],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("out.png"),
    scale: Annotated[float | None, typer.Option(help="How many times as wide and as high; 2, or the model's.")] = None,
    model: Annotated[str | None, typer.Option(help="lanczos, or an upscaler of `heliograph adapters`.")] = None,
    address: Address = ADDRESS,
    local: Local = False,
    config: Config = CONFIG,
) -> None:
    """Make IMAGE larger, through a server or with --local. The format is the output file's."""
    from rich.progress import Progress

    from app import client, deployment
    from app.settings import UpscalerSettings
    from models.parts import Upscale

    format, picture = _format(output), read_picture("image", image)
    if not local:
        output.write_bytes(client.Client(address).upscale(picture, scale, model, format))
        return
    wanted = Upscale(model=model) if scale is None else Upscale(scale=scale, model=model)
    settings = deployment.read(config)[0].upscaler or UpscalerSettings()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("tiles", total=None)
        data = client.upscale_locally(
            settings, picture, wanted, format, lambda done, total: bar.update(task, completed=done, total=total)
        )
    output.write_bytes(data)


@models_app.command("list")
def list_models(address: Address = ADDRESS, local: Local = False, config: Config = CONFIG) -> None:
    """Every model: its size, its defaults, and whether it is awake. * is used when none is named."""
    from rich.table import Table

    table = Table("model", "family", "state", "size", "max pixels", "steps", "guidance", "sampler")
    for model in _models(address, local, config):
        size, defaults = model["size"], model["defaults"]
        name = f"{model['id']} *" if model["default"] else model["id"]
        numbers = (str(model["limits"]["max_pixels"]), str(defaults["steps"]), str(defaults["guidance_scale"]))
        sampler = f"{defaults['sampler']}/{defaults['schedule']}"
        state = (model["family"], model["state"], f"{size['width']}x{size['height']}")
        table.add_row(name, *state, *numbers, sampler)
    Console().print(table)


@models_app.command("show")
def show_model(name: str, address: Address = ADDRESS, local: Local = False, config: Config = CONFIG) -> None:
    """All that one model can do, as JSON."""
    from app import client

    if not local:
        model = client.Client(address).model(name)
    else:
        found = [model for model in _models(address, local, config) if model["id"] == name]
        if not found:
            raise InvalidRequest("name", f"there is no model {name!r} in {config}")
        model = found[0]
    Console().print_json(data=model)


def _models(address: str, local: bool, config: Path) -> list[dict[str, Any]]:
    if not local:
        from app import client

        return client.Client(address).models()
    from app import deployment
    from app.dialects.native import from_model
    from app.service import ModelDescription

    catalogue = deployment.read(config)[0].catalogue
    cards = catalogue.cards().values()
    default = catalogue.default_model
    return [from_model(ModelDescription(card=c, state="cold", default=c.name == default)) for c in cards]


@app.command()
def adapters(address: Address = ADDRESS) -> None:
    """Every LoRA, embedding, ControlNet, preprocessor and upscaler, and the models that can use it."""
    from rich.table import Table

    from app import client

    table = Table("name", "kind", "models", "base", "bytes", "sha256")
    for adapter in client.Client(address).adapters():
        file = ["" if adapter[key] is None else str(adapter[key])[:12] for key in ("base", "bytes", "sha256")]
        table.add_row(adapter["name"], adapter["kind"], ", ".join(adapter["models"]), *file)
    Console().print(table)


@app.command()
def samplers(address: Address = ADDRESS) -> None:
    """Every sampler: the other names that it answers to, and its schedules."""
    from rich.table import Table

    from app import client

    table = Table("sampler", "also known as", "schedules")
    for sampler in client.Client(address).samplers():
        table.add_row(sampler["name"], ", ".join(sampler["aliases"]), ", ".join(sampler["schedules"]))
    Console().print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure Heliograph against diffusers and @serve.batch; options go to `python -m bench`."""
    sys.exit(subprocess.call([sys.executable, "-m", "bench", *context.args]))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def batch(context: typer.Context) -> None:
    """Draw a file of prompts with engines on Ray, into a folder or a bucket, as `python -m cluster.batch` does."""
    os.execv(sys.executable, [sys.executable, "-m", "cluster.batch", *context.args])


if __name__ == "__main__":
    main()
