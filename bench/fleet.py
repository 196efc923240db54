"""A fleet: a server of simulated models on this machine, whose replicas are counted out while it runs."""

import asyncio
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import yaml

from bench.replicas import Count, count
from bench.serving import PROJECT, Serving, end_on_sigterm
from bench.simulation import SIMULATION, Times, simulated

READY_TIMEOUT_S = 300.0  # for a wave of replicas: each imports torch, and they share the machine's cores
WAVE = 8  # replicas that start at a time; of more, those that run already would miss their health checks
POLL_S = 0.5
GATEWAY = "gateway"
CPUS = 0.01  # what Ray counts for an actor of ours: they have to find room on one small machine


class Fleet:
    """A server whose models are sd15, each with times of its own and these settings for all.

    Every application has one replica in the beginning. `environment` is Ray's.
    """

    def __init__(self, times: Mapping[str, Times], environment: Mapping[str, str] | None = None, **settings: Any):
        self._times, self._settings = times, settings
        self._environment = {"RAY_AUTH_MODE": "disabled"} | dict(environment or {})

    async def __aenter__(self) -> Self:
        end_on_sigterm()
        options = [word for pair in self._environment.items() for word in ("--environment", "=".join(pair))]
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="heliograph-fleet-")))
            config = configuration(folder, self._times, self._settings)
            serving = Serving(folder, lambda _: config, program=(*SIMULATION, *options))
            self._serving = await stack.enter_async_context(serving)
            dashboard = httpx2.AsyncClient(base_url=await serving.dashboard(), timeout=30)
            self._dashboard = await stack.enter_async_context(dashboard)
            self._counts = {application["name"]: 1 for application in config["applications"]}
            for application in self._counts:
                await self._running(application)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def address(self) -> str:
        return self._serving.address

    @property
    def pid(self) -> int:
        """The process that all others of the server belong to."""
        return self._serving.pid

    async def count(self, application: str, replicas: int) -> None:
        """Has the application run so many replicas; the others are not touched. Raises TimeoutError."""
        while self._counts[application] != replicas:
            self._counts[application] = min(replicas, self._counts[application] + WAVE)
            await self._deploy()
            await self._running(application)

    async def _running(self, application: str) -> None:
        """Waits until as many replicas run as are counted."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not self._is_whole(application, await count(self._dashboard, application)):
                self._serving.check_is_alive()
                await asyncio.sleep(POLL_S)

    def _is_whole(self, application: str, found: Count) -> bool:
        return found.running == found.held == self._counts[application]

    async def _deploy(self) -> None:
        """The configuration with the present counts. Serve changes them in place, as nothing else is another."""
        applications = [self._counted(application) for application in self._serving.config["applications"]]
        config = self._serving.config | {"applications": applications}
        (await self._dashboard.put("/api/serve/applications/", json=config)).raise_for_status()

    def _counted(self, application: dict[str, Any]) -> dict[str, Any]:
        [deployment] = application["deployments"]
        return application | {"deployments": [deployment | {"num_replicas": self._counts[application["name"]]}]}


def configuration(folder: Path, times: Mapping[str, Times], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The repository's configuration with these models instead, its data in the folder, no upscaler and no jobs."""
    shipped = yaml.safe_load((PROJECT / "serve_config.yaml").read_text().replace("data/", f"{folder}/data/"))
    gateway = next(application for application in shipped["applications"] if application["name"] == GATEWAY)
    del gateway["args"]["jobs"]
    models = [{"name": name, "source": "models/embedded/sd15", **settings} for name in times]
    catalogue = {"models": models, "default_model": models[0]["name"]}
    gateway["deployments"] = [_deployment("Gateway") | {"user_config": catalogue}]
    named = {"route_prefix": None, "import_path": "app.main:model", "deployments": [_deployment("Model")]}
    applications = [{"name": f"model-{args['name']}", "args": args, **named} for args in models]
    return simulated(shipped | {"applications": [*applications, gateway]}, times)


def _deployment(name: str) -> dict[str, Any]:
    return {"name": name, "num_replicas": 1, "ray_actor_options": {"num_cpus": CPUS}}
