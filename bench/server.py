"""H: Heliograph through HTTP, the server that `heliograph serve` starts, asked as any client would."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import yaml

from bench.inprocess import MAX_WAIT_S, MAX_WAITING
from bench.serving import PROJECT, Serving, end_on_sigterm
from bench.workloads import MODEL
from models.request import GenerationRequest

FIELDS = ("model", "prompt", "width", "height", "steps", "guidance_scale", "seed", "sampler", "schedule")


class Server:
    """The whole application, in processes of its own, with the repository's own configuration less the other models."""

    name = "H"
    title = "Heliograph, through HTTP"

    def __init__(self, threads: int, **settings: Any):
        """`settings` are those of the model that differ from the repository's."""
        self._settings = {"threads": threads, "max_waiting": MAX_WAITING, "max_wait_s": MAX_WAIT_S} | settings

    async def __aenter__(self) -> Self:
        end_on_sigterm()  # ray's own handler for the signal would not
        self._folder = tempfile.TemporaryDirectory(prefix="heliograph-bench-")
        folder = Path(self._folder.name)
        self._serving = Serving(folder, lambda _: one_model(shipped(folder), self._settings))
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(base_url=self._serving.address, timeout=None, limits=limits)
        try:
            await self._serving.__aenter__()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._serving.__aexit__(kind, error, trace)
        await self._leave()

    async def _leave(self) -> None:
        await self._client.aclose()
        self._folder.cleanup()

    async def generate(self, request: GenerationRequest) -> bytes:
        values = asdict(request)
        body = {field: values[field] for field in FIELDS} | {"cache": False}  # drawing is what is measured
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
        return self._serving.pid

    async def work(self) -> None:
        """A client does not see it."""


def shipped(folder: Path) -> dict[str, Any]:
    """The repository's own configuration, which keeps its data in the folder."""
    return yaml.safe_load((PROJECT / "serve_config.yaml").read_text().replace("data/", f"{folder}/data/"))


def one_model(config: dict[str, Any], settings: dict[str, Any], jobs: bool = False) -> dict[str, Any]:
    """The configuration with only the benchmarked model, which has these settings besides its own; without jobs
    unless they are wanted."""
    left_out = {a["name"] for a in config["applications"] if a["name"].startswith("model-") and MODEL not in a["name"]}
    left_out |= set() if jobs else {"jobs"}
    applications = [a for a in config["applications"] if a["name"] not in left_out]
    model = next(a for a in applications if a["name"] == f"model-{MODEL}")
    model["args"] |= settings
    for application in applications:
        if application["name"] in ("gateway", "jobs"):
            application["deployments"][0]["user_config"] |= {"default_model": MODEL, "models": [model["args"]]}
    if not jobs:
        del next(a for a in applications if a["name"] == "gateway")["args"]["jobs"]
    return {**config, "applications": applications}
