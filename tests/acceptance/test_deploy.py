"""`serve deploy` on the running server: what changes in place, and what a replica that drains still hears."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import yaml

from tests.acceptance.conftest import ENVIRONMENT, Server

Change = Callable[[dict[str, Any]], None]


def wait(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


@pytest.fixture
def deploy(server: Server, tmp_path: Path) -> Iterator[Callable[[Change], None]]:
    """Deploys the server's configuration with a change in it. At the end it is deployed as it was."""

    def run(change: Change) -> None:
        config = yaml.safe_load(server.config.read_text())
        change(config)
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [Path(sys.executable).parent / "serve", "deploy", file, "-a", server.dashboard]
        subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=60)

    yield run
    run(lambda config: None)
    wait(lambda: offered(server) == ["sd15", "sd21", "sdxl"])


def application(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(application for application in config["applications"] if application["name"] == name)


def offered(server: Server) -> list[str]:
    answer = httpx2.get(f"{server.address}/v1/models", timeout=30)
    assert answer.status_code == 200, answer.text
    return [model["id"] for model in answer.json()["data"]]


def states(server: Server, name: str) -> list[str]:
    """Those of an application's replicas."""
    told = httpx2.get(f"{server.dashboard}/api/serve/applications/", timeout=30).json()["applications"][name]
    return [replica["state"] for deployment in told["deployments"].values() for replica in deployment["replicas"]]


def test_the_offered_models_change_in_place(server: Server, deploy: Callable[[Change], None]):
    def without_sd21(config: dict[str, Any]) -> None:
        catalogue = application(config, "gateway")["deployments"][0]["user_config"]
        catalogue["models"] = [model for model in catalogue["models"] if model["name"] != "sd21"]

    before = {process.pid for process in server.replicas()}
    assert len(before) >= 3  # of the gateway and of two models
    deploy(without_sd21)
    wait(lambda: offered(server) == ["sd15", "sdxl"])
    assert server.post(steps=1, model="sd21").status_code == 404
    assert {process.pid for process in server.replicas() if process.status() != psutil.STATUS_ZOMBIE} == before


def test_a_request_on_a_replica_that_drains_can_be_ended(server: Server, deploy: Callable[[Change], None]):
    def another_sd21(config: dict[str, Any]) -> None:
        application(config, "model-sd21")["args"]["max_waiting"] = 63
        catalogue = application(config, "gateway")["deployments"][0]["user_config"]
        next(model for model in catalogue["models"] if model["name"] == "sd21")["max_waiting"] = 63

    with server.stream(model="sd21", steps=150, width=320, height=320) as events:
        id = next(event.data["id"] for event in events if event.name == "queued")
        next(event for event in events if event.name == "progress")
        deploy(another_sd21)
        wait(lambda: "STOPPING" in states(server, "model-sd21"))
        answer = httpx2.post(f"{server.address}/v1/requests/{id}/accept", timeout=30)
        heard = list(events)
    assert answer.status_code == 202
    assert heard[-1].name == "done"
    assert max(event.data["step"] for event in heard if event.name == "progress") < 150, "it was over before"
