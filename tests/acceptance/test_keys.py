"""A real server that wants keys: the command makes them, the gateway knows them, and the configuration's paths hold."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from bench.serving import PROJECT
from tests.acceptance.conftest import ENVIRONMENT, MAX_ROWS, serving

BODY = {"prompt": "a red circle", "steps": 2}


def configuration() -> dict[str, Any]:
    """What ships, with one model, a gateway that wants keys and keeps pictures, and paths that are relative."""
    raw = yaml.safe_load((PROJECT / "serve_config.yaml").read_text())
    model, gateway = raw["applications"][0], raw["applications"][-1]
    model["args"]["max_rows"] = MAX_ROWS
    del gateway["args"]["jobs"]
    gateway["args"] |= {"auth": "keys", "store": {"kind": "folder"}}
    gateway["deployments"][0]["user_config"] = {"default_model": "sd15", "models": [model["args"]]}
    return raw | {"applications": [model, gateway]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "serve_config.yaml").write_text(yaml.safe_dump(configuration()))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A server of this configuration alone, started in the folder of its configuration."""
    with serving(Path("serve_config.yaml"), folder / "log", folder) as (_, address):
        yield address


def heliograph(folder: Path, *arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *arguments]
    environment = ENVIRONMENT | {"HELIOGRAPH_API_KEY": key}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_server_wants_the_key_that_the_command_made(address: str, folder: Path):
    assert httpx2.get(f"{address}/healthz").status_code == 200
    assert httpx2.post(f"{address}/v1/generate", json=BODY).status_code == 401
    made = heliograph(folder, "keys", "create", "painter", "--requests-per-minute", "5")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    headers = {"x-api-key": key, "accept": "image/png"}
    answer = httpx2.post(f"{address}/v1/generate", json=BODY, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.headers["ratelimit-remaining"] == "4"
    drawn = heliograph(folder, "generate", "a red circle", "--steps", "2", "-a", address, key=key)
    assert drawn.returncode == 0, drawn.stderr
    assert heliograph(folder, "keys", "revoke", key.split("_")[1]).returncode == 0
    refused = heliograph(folder, "models", "list", "-a", address, key=key)
    assert "this API key is revoked" in refused.stderr
    assert {path.name for path in (folder / "data").iterdir()} >= {"heliograph.db", "secret", "pictures"}
