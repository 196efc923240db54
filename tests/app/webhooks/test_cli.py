"""`heliograph webhooks` as an operator uses it, on a database of its own."""

import asyncio
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app import cli
from app.database import Database, perform
from app.jobs.job import Webhook
from app.jobs.outbox import Outbox
from app.jobs.store import JobStore
from models.errors import InvalidRequest
from tests.app.jobs.making import submit


@pytest.fixture
def url(tmp_path: Path, blank_file: Path) -> str:
    return f"sqlite:///{shutil.copy(blank_file, tmp_path / 'jobs.db')}"


@pytest.fixture
def config(url: str, tmp_path: Path) -> Path:
    """The configuration that ships, with a database of its own."""
    shipped = Path("serve_config.yaml").read_text()
    changed = shipped.replace("sqlite:///data/heliograph.db", url)
    assert changed != shipped
    path = tmp_path / "config.yaml"
    path.write_text(changed)
    return path


def dead_letters(url: str, *owners: str) -> list[str]:
    """The id of one that nobody took, for each owner; the last one's address wants no more."""

    async def dying(database: Database) -> list[str]:
        store, outbox, ids = JobStore(database), Outbox(database), []
        for owner in owners:
            job = await submit(store, owner, webhook=Webhook(url=f"https://{owner}.example.com/hook"))
            await store.cancel(job.id, owner)
            (delivery,) = await outbox.claim_due(1, 60.0)
            if owner == owners[-1]:
                await outbox.disable(delivery, 410, "gone")
            else:
                await outbox.failed(delivery, 500, "the receiver did not take it", None)
            ids.append(delivery.id)
        return ids

    return perform(url, dying)


def still_dead(url: str) -> list[str]:
    async def dead(database: Database) -> list[str]:
        return [letter.id for letter in await Outbox(database).dead(None)]

    return perform(url, dead)


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in ("webhooks", *arguments)])


def test_all_dead_letters_are_replayed_but_those_of_a_disabled_address(url: str, config: Path) -> None:
    ada, bob, gone = dead_letters(url, "ada", "bob", "eve")
    listed = run("dead", "--config", config)
    assert [line.split()[0] for line in listed.output.splitlines()[::2]] == [ada, bob, gone]
    replayed = run("replay", "--all", "--config", config)
    assert replayed.exit_code == 1
    assert gone in replayed.output
    assert still_dead(url) == [gone]


def test_one_callers_dead_letters_are_replayed(url: str, config: Path) -> None:
    ada, bob, gone = dead_letters(url, "ada", "bob", "eve")
    assert run("replay", "--all", "--owner", "ada", "--config", config).exit_code == 0
    assert still_dead(url) == [bob, gone]
    mixed = run("replay", ada, bob, "--config", config)
    assert (mixed.exit_code, ada in mixed.output) == (1, True), "what is not dead is told, the other is sent"
    assert still_dead(url) == [gone]


@pytest.mark.parametrize("arguments", [(), ("msg_1", "--all")])
def test_ids_or_all_are_wanted(arguments: tuple[str, ...], config: Path) -> None:
    assert isinstance(run("replay", *arguments, "--config", config).exception, InvalidRequest)


def test_a_rotated_secret_is_the_one_that_signs(url: str, config: Path) -> None:
    new = run("rotate", "--owner", "ada", "--config", config).output.strip()
    assert new.startswith("whsec_")
    assert run("secret", "--owner", "ada", "--config", config).output.strip() == new
    assert asyncio.run(_secret(url)) == new


async def _secret(url: str) -> str:
    database = Database(url)
    secret = await Outbox(database).secret("ada")
    await database.close()
    return secret
