"""What befalls a cluster under load, one function for each: it gives what came of the requests meanwhile."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.nodes.cluster import HEAD, Cluster
from tests.nodes.load import Load, Span
from tests.nodes.system import System

MODEL = "sd15"  # whose node it befalls; it has several replicas
LONELY = "sdxl"  # has one replica, on the only node with a GPU of its kind
# Serve starts a replica elsewhere first only where more time is left than graceful_shutdown_timeout_s (180 s).
DRAIN_S = 600


@dataclass(frozen=True)
class Stage:
    """Where it happens."""

    cluster: Cluster
    system: System
    load: Load
    start_missing: Callable[[], Awaitable[None]]  # the nodes that do not run

    @asynccontextmanager
    async def under_load(self) -> AsyncIterator[list[Span]]:
        """A list that holds, when the block has ended, what came of the requests from its beginning on."""
        async with self.load:
            with self.load.span() as spans:
                await self.load.some_more()
                yield spans
                await self.load.some_more()


Fault = Callable[[Stage], Awaitable[Span]]


async def kill_a_node(stage: Stage) -> Span:
    """SIGKILL for a raylet and its workers, a replica among them. It is whole when another node has the replica."""
    victim = (await stage.system.replicas(MODEL))[0]
    async with stage.under_load() as spans:
        await stage.cluster.kill(victim.node)
        await stage.system.until_whole(lambda replica: replica.node != victim.node)
    return spans[0]


async def lose_the_only_node(stage: Stage) -> Span:
    """The only node that has a GPU for a model is killed, and started again: meanwhile the model's requests wait."""
    victim = (await stage.system.replicas(LONELY))[0]
    async with stage.under_load() as spans:
        await stage.cluster.kill(victim.node)
        await stage.start_missing()
        await stage.system.until_whole()
    return spans[0]


async def drain_a_node(stage: Stage) -> Span:
    """A node is drained, and stopped when no replica is left on it."""
    leaving = (await stage.system.replicas(MODEL))[0]
    async with stage.under_load() as spans:
        await stage.cluster.drain(leaving.node_id, DRAIN_S)
        await stage.system.until_whole(lambda replica: replica.node != leaving.node)
        await stage.system.until_left(MODEL, leaving.node)
        await stage.cluster.stop(leaving.node)
    return spans[0]


async def update_a_model(stage: Stage) -> Span:
    """Other arguments of one model are deployed. It is whole when all its processes are new; the others' are not."""
    before = await stage.system.pids()
    old = before.pop(f"model-{MODEL}")
    async with stage.under_load() as spans:
        await stage.system.update(MODEL, max_waiting=63)
        await stage.system.until_whole(lambda replica: replica.pid not in old)
    after = await stage.system.pids()
    changed = {name for name, pids in before.items() if after[name] != pids}
    if changed:
        raise AssertionError(f"processes of others were replaced: {', '.join(changed)}")
    return spans[0]


async def restart_the_head(stage: Stage) -> Span:
    """The head is killed and started again. Nothing is deployed: it has to know what ran.

    Nobody asks meanwhile, since this cluster's gateway and proxy live on the head. The models' processes go on.
    """
    models = [name for name in await stage.system.pids() if name.startswith("model-")]
    before = {name: await stage.system.replicas_of(name) for name in models}
    began = time.monotonic()
    await stage.cluster.kill(HEAD)
    await stage.cluster.start_head()
    await stage.system.until_whole()
    seconds = time.monotonic() - began
    after = {name: await stage.system.replicas_of(name) for name in models}
    if {name: {r.pid for r in found} for name, found in after.items()} != {
        name: {r.pid for r in found} for name, found in before.items()
    }:
        raise AssertionError("models were loaded anew")
    async with stage.under_load() as spans:
        pass
    return Span(spans[0].answers, seconds)
