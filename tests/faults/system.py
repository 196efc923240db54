"""The application under test: `heliograph serve` with a configuration of its own, and its processes by what they do."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import psutil
import yaml

from app.settings import ModelSettings
from tests.acceptance.conftest import free_port
from tests.faults.log import FaultKind
from tests.faults.places import Place

ROOT = Path(__file__).resolve().parents[2]
MODEL = "sd15"
RUNNERS = 2
START_TIMEOUT_S = 280.0
STOP_TIMEOUT_S = 90.0
MARK = "HELIOGRAPH_FAULTS"  # in the environment of every process of a run: its folder
# How Ray names its processes. A replica's title goes on with its deployment and what it does at the moment.
TITLES: Mapping[FaultKind, str] = {
    "model": f"ray::ServeReplica:model-{MODEL}:",
    "runner": "ray::ServeReplica:jobs:",
    "gateway": "ray::ServeReplica:gateway:",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the application is started among: its database, its store, the port of whoever takes its webhooks."""

    folder: Path
    database: str
    place: Place
    hooks_port: int

    @property
    def secret_file(self) -> Path:
        return self.folder / "secret"


class System:
    """The application, for as long as the block lasts. Whatever it has started ends with it."""

    def __init__(self, surroundings: Surroundings):
        self._surroundings = surroundings
        self._port = free_port()
        self._log = surroundings.folder / "server.log"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        config = self._surroundings.folder / "serve_config.yaml"
        described = configuration(self._surroundings, self.address)
        config.write_text(yaml.safe_dump(described))
        self.model = ModelSettings.model_validate(described["applications"][0]["args"])
        environment = os.environ | {"RAY_AUTH_MODE": "disabled", MARK: str(self._surroundings.folder)}
        environment |= self._surroundings.place.environment
        command = (sys.executable, "-m", "app.cli", "serve", "--config", str(config), "--port", str(self._port))
        with self._log.open(
            "wb"
        ) as said:  # a session of its own: a terminal's Ctrl-C is for the harness, which stops it
            self._process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True
            )
        try:
            await self._wait_until_ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """SIGTERM first; what is left of its processes after that, such as of a Ray without its head, is killed."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        left = processes_of(self._surroundings.folder)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.to_thread(psutil.wait_procs, left, STOP_TIMEOUT_S)

    def processes(self, kind: FaultKind) -> list[psutil.Process]:
        """Those that do this. Raises RuntimeError where the server itself is gone."""
        self._check_is_alive()
        children = psutil.Process(self._process.pid).children(recursive=True)
        return [process for process in children if _title(process).startswith(TITLES[kind])]

    async def _wait_until_ready(self) -> None:
        async with asyncio.timeout(START_TIMEOUT_S), httpx2.AsyncClient() as client:
            while True:
                self._check_is_alive()
                with suppress(httpx2.TransportError):  # nobody listens yet
                    if (await client.get(f"{self.address}/readyz", timeout=10)).status_code == 200:
                        return
                await asyncio.sleep(0.5)

    def _check_is_alive(self) -> None:
        if self._process.returncode is not None:
            raise RuntimeError(f"heliograph serve ended:\n{self._log.read_text()[-2000:]}")


def configuration(surroundings: Surroundings, address: str) -> dict[str, Any]:
    """What ships, with one model, several runners, keys, and the places of this run."""
    raw = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    applications = {application["name"]: application for application in raw["applications"]}
    model, gateway, jobs = (applications[name] for name in (f"model-{MODEL}", "gateway", "jobs"))
    model["args"] |= {"max_rows": 16, "threads": 1}  # not measured at every start; small pictures gain nothing by more
    settings = dict(surroundings.place.settings)
    if settings["kind"] == "folder":
        settings["base_url"] = address
    shared = {
        "database": surroundings.database,
        "secret_file": str(surroundings.secret_file),
        "store": settings,
        "fetch": {"allowed": ["127.0.0.0/8"], "ports": [surroundings.hooks_port]},
    }
    gateway["args"] |= shared | {"auth": "keys"}
    jobs["args"] |= shared
    jobs["deployments"][0]["num_replicas"] = RUNNERS
    for application in (gateway, jobs):
        application["deployments"][0]["user_config"] = {"default_model": MODEL, "models": [model["args"]]}
    return raw | {"applications": [model, gateway, jobs]}


def processes_of(folder: Path) -> list[psutil.Process]:
    """What still lives of the server that was started in this folder."""
    return [process for process in psutil.process_iter() if _mark(process) == str(folder)]


def _mark(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
