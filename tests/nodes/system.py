"""The application on a cluster: the production configuration with small models on the CPU, deployed and watched."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import yaml

from app.settings import FRONT_DEPLOYMENT
from tests.nodes.cluster import Cluster

READY_TIMEOUT_S = 240.0
LOOK_S = 0.3


@dataclass(frozen=True)
class Replica:
    """One replica: its state, its process, and the node it is on."""

    state: str
    pid: int
    node: str
    node_id: str


class System:
    """A configuration on a cluster, and what Serve says of it."""

    def __init__(self, cluster: Cluster, config: dict[str, Any], replicas: Mapping[str, int]):
        """`replicas` says how many of each model there are once it is whole."""
        self._cluster, self.config, self._wanted = cluster, config, replicas
        self.address = "http://{host}:{port}".format(**config["http_options"])

    async def deploy(self) -> None:
        """Returns when every replica runs and the gateway is ready."""
        await self._cluster.deploy(self.config)
        await self.until_whole()

    async def update(self, model: str, **arguments: Any) -> None:
        """Deploys other arguments of one model; returns at once."""
        args = _application(self.config, f"model-{model}")["args"]
        args |= arguments  # the gateway's list of models holds the same object
        await self._cluster.deploy(self.config)

    async def replicas(self, model: str) -> list[Replica]:
        """Those of a model that run."""
        return await self.replicas_of(f"model-{model}")

    async def replicas_of(self, application: str) -> list[Replica]:
        """Those of an application that run, and live."""
        return [replica for replica in await self._placed(application) if replica.state == "RUNNING"]

    async def _placed(self, application: str) -> list[Replica]:
        """All of an application that live: those that start, drain and stop among them."""
        told = (await self._cluster.applications()).get(application, {"deployments": {}})
        working = [deployment for name, deployment in told["deployments"].items() if name != FRONT_DEPLOYMENT]
        found = [r for deployment in working for r in deployment["replicas"]]
        begun = [r for r in found if r.get("pid") and r.get("node_id")]  # the others wait for a place
        placed = [Replica(r["state"], r["pid"], self._cluster.node_of(r["pid"]), r["node_id"]) for r in begun]
        return [replica for replica in placed if replica.node]

    async def pids(self) -> dict[str, list[int]]:
        """The processes of every application."""
        names = [application["name"] for application in self.config["applications"]]
        return {name: sorted(replica.pid for replica in await self.replicas_of(name)) for name in names}

    async def until_whole(self, also: Callable[[Replica], bool] = lambda _: True) -> None:
        """Waits until each model has its replicas, every one of them as wanted, and the gateway is ready."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not await self._is_whole(also):
                await self._raise_where_failed()
                await asyncio.sleep(LOOK_S)

    async def until_left(self, model: str, node: str) -> None:
        """Waits until no replica of the model is on the node, not even one that still finishes a request."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            while True:
                if all(replica.node != node for replica in await self._placed(f"model-{model}")):
                    return
                await asyncio.sleep(LOOK_S)

    async def _is_whole(self, also: Callable[[Replica], bool]) -> bool:
        for model, count in self._wanted.items():
            found = await self.replicas(model)
            if len(found) != count or not all(map(also, found)):
                return False
        with suppress(httpx2.TransportError):
            async with httpx2.AsyncClient() as client:
                return (await client.get(f"{self.address}/readyz", timeout=10)).status_code == 200
        return False

    async def _raise_where_failed(self) -> None:
        for name, told in (await self._cluster.applications()).items():
            if told["status"] == "DEPLOY_FAILED":
                raise RuntimeError(f"{name} failed to deploy: {told['message']}")


def small(config: Path, folder: Path, port: int, replicas: Mapping[str, int]) -> dict[str, Any]:
    """A production configuration as it can run here: these of its models alone, embedded and on the CPU, though each
    replica still takes a GPU of the kind it wants; SQLite and a folder; the gateway and its proxy on the head."""
    raw = yaml.safe_load(config.read_text())
    kept = {"database": f"sqlite:///{folder}/heliograph.db", "secret_file": f"{folder}/secret"}
    kept["store"] = {"kind": "folder", "path": f"{folder}/pictures"}
    for name, count in replicas.items():
        application = _application(raw, f"model-{name}")
        application["args"] |= {"source": f"models/embedded/{name}", "device": "cpu", "dtype": "float32"}
        application["args"] |= {"max_rows": 8, "threads": 1}  # not measured: a warm-up on a busy machine takes long
        deployment = application["deployments"][0]
        del deployment["autoscaling_config"]
        # A copy: models of one class share these by an anchor.
        deployment |= {"num_replicas": count, "ray_actor_options": deployment["ray_actor_options"] | {"num_cpus": 0.1}}
    gateway = _application(raw, "gateway")
    gateway["args"] |= kept | {"auth": "loopback"}
    del gateway["args"]["jobs"]
    catalogue = gateway["deployments"][0]["user_config"]
    catalogue["models"] = [model for model in catalogue["models"] if model["name"] in replicas]
    catalogue["default_model"] = next(iter(replicas))
    catalogue["upscaler"] = None
    gateway["deployments"][0]["ray_actor_options"] |= {"num_cpus": 0.1}
    gateway["deployments"][0]["num_replicas"] = 1
    names: Sequence[str] = ("gateway", *(f"model-{name}" for name in replicas))
    return raw | {
        "proxy_location": "HeadOnly",  # several proxies of one machine would want the same port
        "http_options": raw["http_options"] | {"host": "127.0.0.1", "port": port},
        "applications": [application for application in raw["applications"] if application["name"] in names],
    }


def _application(raw: dict[str, Any], name: str) -> dict[str, Any]:
    return next(application for application in raw["applications"] if application["name"] == name)
