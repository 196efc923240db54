"""The application under test: `heliograph serve` with a configuration of its own, and its processes by what they do."""

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from app.settings import ModelSettings
from bench.serving import PROJECT, STOP_TIMEOUT_S, Serving
from tests.faults.log import FaultKind
from tests.faults.places import Place

MODEL = "sd15"
RUNNERS = 2
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
        environment = os.environ | {"RAY_AUTH_MODE": "disabled", MARK: str(surroundings.folder)}
        environment |= surroundings.place.environment
        # What is stored is given out by the server itself, so its configuration names its own address.
        self._serving = Serving(surroundings.folder, lambda address: configuration(surroundings, address), environment)
        self.model = ModelSettings.model_validate(self._serving.config["applications"][0]["args"])

    @property
    def address(self) -> str:
        return self._serving.address

    async def __aenter__(self) -> Self:
        try:
            await self._serving.__aenter__()
        except BaseException:
            await self._sweep()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._serving.__aexit__(kind, error, trace)
        await self._sweep()

    async def _sweep(self) -> None:
        """What is left of the server's processes, such as of a Ray without its head, is killed."""
        left = processes_of(self._surroundings.folder)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.to_thread(psutil.wait_procs, left, STOP_TIMEOUT_S)

    def processes(self, kind: FaultKind) -> list[psutil.Process]:
        """Those that do this. Raises RuntimeError where the server itself is gone."""
        self._serving.check_is_alive()
        children = psutil.Process(self._serving.pid).children(recursive=True)
        return [process for process in children if _title(process).startswith(TITLES[kind])]


def configuration(surroundings: Surroundings, address: str) -> dict[str, Any]:
    """What ships, with one model, several runners, keys, and the places of this run."""
    raw = yaml.safe_load((PROJECT / "serve_config.yaml").read_text())
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
