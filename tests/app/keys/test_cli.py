"""`heliograph keys` on the database of a configuration."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.database import Database
from app.keys import registry

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    raw = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    for application in raw["applications"][-2:]:  # the runners and the gateway, which share them
        application["args"] |= {
            "database": f"sqlite:///{tmp_path / 'keys.db'}",
            "secret_file": str(tmp_path / "secret"),
        }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def heliograph(config: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", "keys", *map(str, arguments), "--config", str(config)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


async def test_a_key_is_shown_once_and_lives_until_it_is_rotated_and_revoked(config: Path, tmp_path: Path):
    options = ("--scope", "generate", "--scope", "jobs", "--requests-per-minute", 60, "--expires-days", 90)
    created = heliograph(config, "create", "a [b]painter[/b]", *options)
    assert created.returncode == 0, created.stderr
    text = created.stdout.strip()
    id = text.split("_")[1]
    assert id in created.stderr
    assert text not in created.stderr

    rotated = heliograph(config, "rotate", id, "--overlap-hours", 1)
    assert rotated.returncode == 0, rotated.stderr
    new_text = rotated.stdout.strip()

    database = Database(f"sqlite:///{tmp_path / 'keys.db'}")
    keys = registry.opened(database, str(tmp_path / "secret"))
    try:
        assert await keys.caller(text) == await keys.caller(new_text)
    finally:
        await database.close()

    assert heliograph(config, "revoke", id).returncode == 0
    listed = heliograph(config, "list").stdout
    first, about_first, second, about_second = listed.splitlines()
    assert first == f"{id}  revoked  a [b]painter[/b]"
    assert second == f"{new_text.split('_')[1]}  valid    a [b]painter[/b]"
    assert "generate, jobs; made 20" in about_first
    assert f"rotated for {id}; requests_per_minute 60" in about_second
    for secret in (text, new_text):
        assert secret.rsplit("_", 1)[1] not in listed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "a", "--scope", "root"), "generate, jobs, admin"),
        (("create", "a", "--scope", "admin"), "needs `jobs`"),
        (("create", "a", "--requests-per-minute", 0), "between 1 and"),
        (("revoke", "none"), "there is no key 'none'"),
        (("rotate", "none"), "there is no key 'none'"),
    ],
)
def test_a_mistake_is_one_line(config: Path, arguments: tuple[object, ...], words: str):
    ran = heliograph(config, *arguments)
    assert ran.returncode == 1
    assert words in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
