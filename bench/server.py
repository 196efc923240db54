"""H: Heliograph through HTTP, the server that `heliograph serve` starts, asked as any client would."""

import asyncio
import signal
import socket
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import yaml

from bench.inprocess import MAX_WAITING
from bench.workloads import MODEL
from models.request import GenerationRequest

PROJECT = Path(__file__).parents[1]
CONFIG = PROJECT / "serve_config.yaml"
FIELDS = ("model", "prompt", "width", "height", "steps", "guidance_scale", "seed", "sampler", "schedule")
READY_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 90.0


class Server:
    """The whole application, in processes of its own, with the repository's own configuration less the other models."""

    name = "H"
    title = "Heliograph, through HTTP"

    def __init__(self, threads: int, **settings: Any):
        """`settings` are those of the model that differ from the repository's."""
        self._settings = {"threads": threads, "max_waiting": MAX_WAITING} | settings

    async def __aenter__(self) -> Self:
        # Ended from outside, this process must stop what it has started; ray's own handler for the signal would not.
        stopping = asyncio.current_task()
        assert stopping is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.cancel)
        self._folder = tempfile.TemporaryDirectory(prefix="heliograph-bench-")
        config = Path(self._folder.name) / "serve_config.yaml"
        config.write_text(yaml.safe_dump(one_model(yaml.safe_load(CONFIG.read_text()), self._settings)))
        port = _free_port()
        self._log = (Path(self._folder.name) / "log").open("wb")
        command = ("-c", "from app.cli import main; main()", "serve", "--config", str(config), "--port", str(port))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *command, cwd=PROJECT, stdout=self._log, stderr=self._log
        )
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits)
        try:
            await self._wait_until_ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
        self._log.close()
        self._folder.cleanup()

    async def _wait_until_ready(self) -> None:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while True:
                if self._process.returncode is not None:
                    raise RuntimeError(f"heliograph serve ended:\n{self._said()}")
                try:
                    if (await self._client.get("/readyz")).status_code == 200:
                        return
                except httpx2.TransportError:
                    pass  # nobody listens yet
                await asyncio.sleep(0.5)

    def _said(self) -> str:
        return Path(self._log.name).read_text()[-2000:]

    async def generate(self, request: GenerationRequest) -> bytes:
        values = asdict(request)
        body = {field: values[field] for field in FIELDS}
        return await self.post("/v1/generate", body, accept="image/png")

    async def post(self, path: str, body: dict[str, Any], accept: str = "application/json") -> bytes:
        """The answer to a request. Raises RuntimeError for any but 200."""
        response = await self._client.post(path, json=body, headers={"Accept": accept})
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} {response.text}")
        return response.content

    @property
    def pid(self) -> int:
        """The process that everything else belongs to."""
        return self._process.pid

    async def work(self) -> None:
        """A client does not see it."""


def one_model(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration with only the benchmarked model, which has these settings besides its own, and without jobs."""
    wanted = [a for a in config["applications"] if not a["name"].startswith("model-") or MODEL in a["name"]]
    applications = [a for a in wanted if a["name"] != "jobs"]
    model = next(a for a in applications if a["name"] == f"model-{MODEL}")
    model["args"] |= settings
    gateway = next(a for a in applications if a["name"] == "gateway")
    del gateway["args"]["jobs"]
    gateway["deployments"][0]["user_config"] |= {"default_model": MODEL, "models": [model["args"]]}
    return {**config, "applications": applications}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
