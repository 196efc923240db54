"""`heliograph webhooks`: dead letters and secrets in the database of a configuration, whosever they are."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from app.config_option import CONFIG, Config, console
from app.keys.caller import ANONYMOUS
from models.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from app.jobs.outbox import DeadLetter, Outbox

T = TypeVar("T")

webhooks_app = typer.Typer(no_args_is_help=True, help="Webhooks: dead letters, secrets, addresses switched off.")

PAGE, HOUR_S = 200, 3600.0

Owner = Annotated[str, typer.Option(help="The caller's id, from `heliograph keys list`; without keys, all are one.")]
OneOwner = Annotated[str | None, typer.Option("--owner", help="Only this caller's.")]
Url = Annotated[str, typer.Argument(help="An address; without one, the secret of all that have none of their own.")]


@webhooks_app.command()
def dead(owner: OneOwner = None, config: Config = CONFIG) -> None:
    """List what nobody took, the oldest first: on two lines each, and the id is the first word."""
    for letter in _run(config, lambda outbox: _all_dead(outbox, owner)):
        print(f"{letter.id}  {letter.event:9} {letter.url}")
        print(f"    {_about(letter)}")


@webhooks_app.command()
def replay(
    id: Annotated[list[str] | None, typer.Argument(help="From the list; several may be given.")] = None,
    all: Annotated[bool, typer.Option("--all", help="Every dead letter instead.")] = False,
    owner: OneOwner = None,
    config: Config = CONFIG,
) -> None:
    """Send dead letters again. What cannot be is told, and the others are sent."""
    if bool(id) == all:
        raise InvalidRequest("id", "give ids of `heliograph webhooks dead`, or --all")

    async def each(outbox: "Outbox") -> list[str]:
        wanted = id or [letter.id for letter in await _all_dead(outbox, owner)]
        return [refusal for one in wanted if (refusal := await _refusal(outbox, one, owner))]

    refusals = _run(config, each)
    for refusal in refusals:
        console.print(refusal, highlight=False, markup=False, soft_wrap=True)
    if refusals:
        raise typer.Exit(1)


async def _all_dead(outbox: "Outbox", owner: str | None) -> "list[DeadLetter]":
    found: list[DeadLetter] = []
    while page := await outbox.dead(owner, found[-1].id if found else "", PAGE):
        found += page
    return found


async def _refusal(outbox: "Outbox", id: str, owner: str | None) -> str:
    """Why a dead letter cannot be sent again; empty where it will be."""
    try:
        await outbox.replay(id, owner)
    except (InvalidRequest, NotFound) as refused:
        return f"{id}: {refused}"
    return ""


@webhooks_app.command()
def secret(url: Url = "", owner: Owner = ANONYMOUS.id, config: Config = CONFIG) -> None:
    """Print the newest secret that signs a caller's webhooks."""
    print(_run(config, lambda outbox: outbox.secret(owner, url)))


@webhooks_app.command()
def rotate(
    url: Url = "",
    owner: Owner = ANONYMOUS.id,
    overlap_hours: Annotated[float, typer.Option(help="How long the old secret still signs as well.")] = 24.0,
    config: Config = CONFIG,
) -> None:
    """Make a new secret and print it."""
    print(_run(config, lambda outbox: outbox.rotate(owner, url, overlap_hours * HOUR_S)))


@webhooks_app.command()
def enable(
    url: Annotated[str, typer.Argument(help="The address that answered 410.")],
    owner: Owner = ANONYMOUS.id,
    config: Config = CONFIG,
) -> None:
    """Send to an address again that wanted no more. Its dead letters stay dead until they are replayed."""
    _run(config, lambda outbox: outbox.enable(owner, url))
    console.print(f"webhooks go to {url} again", highlight=False, markup=False, soft_wrap=True)


def _about(letter: "DeadLetter") -> str:
    met = letter.error if letter.status is None else f"{letter.status}, {letter.error}"
    since = f"{datetime.fromtimestamp(letter.finished_at, UTC):%Y-%m-%d %H:%M} UTC"
    return f"job {letter.job_id} of {letter.owner}; {letter.attempts} attempts; {met}; dead since {since}"


def _run(config: Path, work: "Callable[[Outbox], Awaitable[T]]") -> T:
    """Does the work on the outbox of a configuration's database."""
    from app import deployment
    from app.database import perform
    from app.jobs.outbox import Outbox

    return perform(deployment.read(config)[0].gateway.database, lambda database: work(Outbox(database)))
