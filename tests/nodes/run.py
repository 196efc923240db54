"""A cluster of a head and three workers, the application on it, and faults one after another."""

from collections.abc import Mapping, Sequence
from functools import partial

from bench.serving import PROJECT, free_port
from tests.nodes.cluster import Cluster
from tests.nodes.faults import (
    Fault,
    Stage,
    drain_a_node,
    kill_a_node,
    lose_the_only_node,
    restart_the_head,
    update_a_model,
)
from tests.nodes.load import Load, Span
from tests.nodes.system import System, small

FAULTS: Mapping[str, Fault] = {
    "kill": kill_a_node,
    "lose": lose_the_only_node,
    "drain": drain_a_node,
    "update": update_a_model,
    "head": restart_the_head,
}
CONFIG = PROJECT / "cluster" / "serve_gpu.yaml"
Workers = Mapping[str, tuple[str, int]]  # the kind of GPU of each, and how many
# Either of the first two has room for all that the other runs.
WORKERS: Workers = {"a": ("L4", 2), "b": ("L4", 2), "c": ("L40S", 1)}
REPLICAS = {"sd15": 2, "sdxl": 1}


async def run(
    faults: Sequence[str],
    replicas: Mapping[str, int] = REPLICAS,
    workers: Workers = WORKERS,
    clients: int = 2,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Span]:
    """What came of the requests while each of these happened, by its name in FAULTS."""
    async with Cluster(environment) as cluster:
        await cluster.start_head()
        system = System(cluster, small(CONFIG, cluster.folder, free_port(), replicas), replicas)
        await start_missing(cluster, workers)
        await system.deploy()
        load = Load(system.address, tuple(replicas), clients)
        stage = Stage(cluster, system, load, partial(start_missing, cluster, workers))
        spans = {}
        for name in faults:
            spans[name] = await FAULTS[name](stage)
            await start_missing(cluster, workers)
        return spans


async def start_missing(cluster: Cluster, workers: Workers) -> None:
    """Starts the workers that do not run."""
    for name, (gpu, gpus) in workers.items():
        if name not in cluster.names or not cluster.processes(name):
            await cluster.start_worker(name, f"ray.io/accelerator-type={gpu}", gpus)
