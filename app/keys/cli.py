"""`heliograph keys`: API keys made, listed, rotated and revoked in the database of a configuration."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from app.config_option import CONFIG, Config, console

if TYPE_CHECKING:
    from app.keys.registry import Key, Keys

T = TypeVar("T")

keys_app = typer.Typer(no_args_is_help=True, help="Who may call the server.")

DAY_S, HOUR_S = 86400.0, 3600.0


@keys_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for the list.")],
    scope: Annotated[list[str], typer.Option(help="generate, jobs, admin (with jobs); again for more.")] = ["generate"],  # noqa: B006
    expires_days: Annotated[float | None, typer.Option(help="Never, unless said.")] = None,
    requests_per_minute: int | None = None,
    pixel_steps_per_minute: Annotated[int | None, typer.Option(help="Width x height x steps x pictures.")] = None,
    concurrent_jobs: Annotated[int | None, typer.Option(help="Requests that may run at a time.")] = None,
    config: Config = CONFIG,
) -> None:
    """Make a key. It is printed this once; the server keeps only a keyed hash of it."""
    from app.keys.caller import Limits

    limits = Limits(
        requests_per_minute=requests_per_minute,
        pixel_steps_per_minute=pixel_steps_per_minute,
        concurrent_jobs=concurrent_jobs,
    )
    lasts_s = None if expires_days is None else expires_days * DAY_S
    _show(*_run(config, lambda keys: keys.create(name, tuple(scope), limits, lasts_s)))


@keys_app.command()
def rotate(
    id: Annotated[str, typer.Argument(help="The old key's id, from the list.")],
    overlap_hours: Annotated[float, typer.Option(help="How long the old key stays valid.")] = 24.0,
    config: Config = CONFIG,
) -> None:
    """Make a new key for the caller of an old one, which stays valid for a while."""
    _show(*_run(config, lambda keys: keys.rotate(id, overlap_hours * HOUR_S)))


@keys_app.command()
def revoke(id: Annotated[str, typer.Argument(help="From the list.")], config: Config = CONFIG) -> None:
    """End a key now. Other keys of the same caller stay valid."""
    key = _run(config, lambda keys: keys.revoke(id))
    console.print(f"{key.id} ({key.name}) is revoked", highlight=False, markup=False)


@keys_app.command("list")
def list_keys(config: Config = CONFIG) -> None:
    """Every key: whose it is, what it may do, from when and until when. Never the key itself."""
    now, found = _run(config, lambda keys: keys.list())
    for key in found:
        print(f"{key.id}  {key.state(now):8} {key.name}")
        print(f"    {_about(key)}")


def _about(key: "Key") -> str:
    """What is known of a key besides its name and state, on one line."""
    words = [", ".join(key.scopes), f"made {_day(key.created_at)}"]
    words += [f"ends {_day(key.expires_at)}"] if key.expires_at is not None else []
    words += [f"revoked {_day(key.revoked_at)}"] if key.revoked_at is not None else []
    words += [f"rotated for {key.caller}"] if key.caller != key.id else []
    words += [f"{name} {value}" for name, value in vars(key.limits).items() if value is not None]
    return "; ".join(words)


def _run(config: Path, work: "Callable[[Keys], Awaitable[T]]") -> T:
    """Does the work on the keys of a configuration's database, whose schema is brought up to date before."""
    from app import deployment
    from app.database import perform
    from app.keys import registry

    gateway = deployment.read(config)[0].gateway
    return perform(gateway.database, lambda database: work(registry.opened(database, gateway.secret_file)))


def _show(key: "Key", text: str) -> None:
    """The key on standard output, alone, so that a script can take it; what is known of it on the other."""
    ends = "never expires" if key.expires_at is None else f"expires on {_day(key.expires_at)}"
    console.print(f"key {key.id} of {key.name}, {', '.join(key.scopes)}, {ends}:", highlight=False, markup=False)
    print(text)


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"
