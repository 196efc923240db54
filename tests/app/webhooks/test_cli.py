"""`heliograph webhooks` on the database of a configuration, SQLite and PostgreSQL."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.jobs.job import Webhook
from app.jobs.outbox import Outbox
from app.jobs.store import JobStore
from tests.app.jobs.making import submit

ROOT = Path(__file__).resolve().parents[3]
URL = "https://example.com/[b]hook[/b]"


@pytest.fixture
def config(tmp_path: Path, url: str) -> Path:
    raw = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    for application in raw["applications"]:
        if application["import_path"] in ("app.main:gateway", "app.main:jobs"):
            application["args"] |= {"database": url, "secret_file": str(tmp_path / "secret")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def heliograph(config: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", "webhooks", *map(str, arguments), "--config", str(config)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def lines(config: Path, *arguments: object) -> list[str]:
    """What a command prints that has to succeed."""
    ran = heliograph(config, *arguments)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


async def test_dead_letters_are_listed_and_replayed_whosever_they_are(
    config: Path, store: JobStore, outbox: Outbox
) -> None:
    jobs = {owner: await submit(store, owner, webhook=Webhook(url=URL)) for owner in ("ada", "bob")}
    for owner, job in jobs.items():
        await store.cancel(job.id, owner)
    for delivery in await outbox.claim_due(2, 60.0):
        await outbox.disable(delivery, 410, "gone")
    ada, bob = await outbox.dead(None)
    first, about, second, _ = lines(config, "dead")
    assert first == f"{ada.id}  completed {URL}"
    assert about.strip().startswith(f"job {jobs['ada'].id} of ada; 1 attempts; 410, gone; dead since 20")
    assert second.startswith(bob.id)
    assert [line.split()[0] for line in lines(config, "dead", "--owner", "bob")[::2]] == [bob.id]

    refused = heliograph(config, "replay", ada.id)
    assert refused.returncode == 1
    assert "enable it first" in refused.stderr
    lines(config, "enable", URL, "--owner", "ada")
    lines(config, "replay", ada.id)
    assert [delivery.id for delivery in await outbox.claim_due(2, 60.0)] == [ada.id]
    assert [letter.id for letter in await outbox.dead(None)] == [bob.id]


async def test_secrets_are_shown_and_rotated(config: Path, outbox: Outbox) -> None:
    (old,) = lines(config, "secret", "--owner", "ada")
    (new,) = lines(config, "rotate", "--owner", "ada", "--overlap-hours", 1)
    assert await outbox.secret("ada") == new != old
    (own,) = lines(config, "rotate", URL)
    assert await outbox.secret("anonymous", URL) == own


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("replay", "msg_1"), "there is no dead letter 'msg_1'"),
        (("enable", URL), "is disabled"),
        (("rotate", "--overlap-hours", "-1"), "overlap_s: must be from 0"),
    ],
)
def test_a_mistake_is_one_line(config: Path, arguments: tuple[object, ...], words: str) -> None:
    ran = heliograph(config, *arguments)
    assert ran.returncode == 1
    assert words in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
