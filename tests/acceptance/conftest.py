"""One real server for the whole session: `heliograph serve` with the configuration that ships, on a port of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled"}
START_TIMEOUT_S = 280.0  # two cores that others use as well
STOP_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Event:
    """A server-sent event and when it arrived."""

    name: str
    data: dict[str, Any]
    at: float


@dataclass(frozen=True)
class Server:
    """A running server: its address, its process, its configuration and the address of Ray's dashboard."""

    address: str
    pid: int
    config: Path
    dashboard: str

    def post(self, **body: Any) -> httpx2.Response:
        return httpx2.post(f"{self.address}/v1/generate", json={"prompt": "a red circle"} | body, timeout=300)

    @contextmanager
    def stream(self, **body: Any) -> Iterator[Iterator[Event]]:
        """The events of a request. Leaving the block closes the connection."""
        request = {"prompt": "a red circle", "stream": True, "preview_every": 0} | body
        with httpx2.stream("POST", f"{self.address}/v1/generate", json=request, timeout=300) as answer:
            assert answer.status_code == 200, answer.read()
            yield _events(answer.iter_lines())

    def replicas(self, application: str = "") -> list[psutil.Process]:
        """The processes that run an application; those of all of them unless it is said."""
        title = f"ray::ServeReplica:{application}"
        return [p for p in psutil.Process(self.pid).children(recursive=True) if _title(p).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _events(lines: Iterator[str]) -> Iterator[Event]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield Event(name, json.loads(line.removeprefix("data: ")), time.monotonic())


def look_at(path: Path) -> tuple[str | None, tuple[int, int]]:
    """A picture file's format and size; the whole picture has to be readable."""
    with Image.open(path) as picture:
        picture.load()
        return picture.format, picture.size


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    port = free_port()
    config = tmp_path_factory.mktemp("config") / "serve_config.yaml"
    # What ships, but for the measured cap: where others use the machine too, it may come out too low to share a step.
    # And what is kept, which is nobody else's.
    shipped = (ROOT / "serve_config.yaml").read_text().replace("data/", f"{config.parent}/data/")
    config.write_text(shipped.replace("&sd15\n", "&sd15\n      max_rows: 16\n"))
    command = [sys.executable, "-m", "app.cli", "serve", "--config", str(config), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        yield Server(address, process.pid, config, _dashboard_when_ready(process, address, log))
        _stop(process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=STOP_TIMEOUT_S)


def _dashboard_when_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> str:
    """The address of Ray's dashboard, which the server tells once it is ready."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            told = re.findall(r"serve status -a (http://\S+)", log.read_text())
            if told and httpx2.get(f"{address}/readyz", timeout=5).status_code == 200:
                return told[0]
        except httpx2.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the server was not ready after {START_TIMEOUT_S} s\n{log.read_text()}")


def _stop(process: subprocess.Popen[bytes], log: Path) -> None:
    """SIGTERM ends it with status 0, and none of its processes lives on."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=STOP_TIMEOUT_S) == 0, log.read_text()
    _, alive = psutil.wait_procs(children, timeout=10)
    left = [_title(p) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left, left
