"""A real server that wants keys: the command makes them, the gateway knows them, and the configuration's paths hold."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from tests.acceptance.conftest import ROOT, START_TIMEOUT_S, STOP_TIMEOUT_S, free_port

BODY = {"prompt": "a red circle", "steps": 2}
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}


def configuration() -> dict[str, Any]:
    """What ships, with one model, a gateway that wants keys and keeps pictures, and paths that are relative."""
    raw = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    model, gateway = raw["applications"][0], raw["applications"][-1]
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
    port = free_port()
    log = folder / "log"
    command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(f"http://127.0.0.1:{port}"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=STOP_TIMEOUT_S)


def _is_ready(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/readyz", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


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
