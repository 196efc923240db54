"""One real server for the whole session: `heliograph serve` with the configuration that ships, on a port of its own."""

import json
import os
import re
import signal
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

from bench.serving import PROJECT, READY_TIMEOUT_S, STOP_TIMEOUT_S, free_port

TELL_TIMEOUT_S = 30.0
MAX_ROWS = 16
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(PROJECT)}


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
        """The answer to a request, which is drawn unless it says otherwise."""
        request = {"prompt": "a red circle", "cache": False} | body
        return httpx2.post(f"{self.address}/v1/generate", json=request, timeout=300)

    @contextmanager
    def stream(self, **body: Any) -> Iterator[Iterator[Event]]:
        """The events of a request. Leaving the block closes the connection."""
        request = {"prompt": "a red circle", "cache": False, "stream": True, "preview_every": 0} | body
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


@contextmanager
def serving(config: Path, log: Path, folder: Path = PROJECT) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`heliograph serve` in that folder, ready, and its address; ended with the block, if it has not ended in it."""
    port = free_port()
    command = [sys.executable, "-m", "app.cli", "serve", "--config", str(config), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not _is_ready(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"not ready after {READY_TIMEOUT_S} s\n{log.read_text()}"
            time.sleep(0.5)
        yield process, address
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=STOP_TIMEOUT_S)


def _is_ready(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/readyz", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    config = tmp_path_factory.mktemp("config") / "serve_config.yaml"
    # What ships, but for the measured cap: where others use the machine too, it may come out too low to share a step,
    # and every replica that starts measures it. And what is kept, which is nobody else's.
    shipped = (PROJECT / "serve_config.yaml").read_text().replace("data/", f"{config.parent}/data/")
    config.write_text(re.sub(r"(&sd15|&sd21|&sdxl)\n", f"\\1\n      max_rows: {MAX_ROWS}\n", shipped))
    with serving(config, log) as (process, address):
        yield Server(address, process.pid, config, _dashboard(log))
        _stop(process, log)


def _dashboard(log: Path) -> str:
    """The address of Ray's dashboard, which the server tells a moment after it is ready."""
    deadline = time.monotonic() + TELL_TIMEOUT_S
    while not (told := re.findall(r"serve status -a (http://\S+)", log.read_text())):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return told[0]


def _stop(process: subprocess.Popen[bytes], log: Path) -> None:
    """SIGTERM ends it with status 0, and none of its processes lives on."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=STOP_TIMEOUT_S) == 0, log.read_text()
    _, alive = psutil.wait_procs(children, timeout=10)
    left = [_title(p) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left, left
