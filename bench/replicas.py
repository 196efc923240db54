"""How many replicas an application had, second by second, as Ray's dashboard tells."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import httpx2

from app.settings import FRONT_DEPLOYMENT

POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Count:
    """Replicas at a second: those that take requests, and all that hold a place, also while they load or stop."""

    at_s: float
    running: int
    held: int


async def count(dashboard: httpx2.AsyncClient, application: str, since: float = 0.0) -> Count:
    """The replicas now. Raises httpx2.HTTPError."""
    told = (await dashboard.get("/api/serve/applications/")).raise_for_status().json()
    deployments = told["applications"][application]["deployments"].items()
    working = [deployment for name, deployment in deployments if name != FRONT_DEPLOYMENT]
    states = [replica["state"] for deployment in working for replica in deployment["replicas"]]
    return Count(at_s=time.monotonic() - since, running=states.count("RUNNING"), held=len(states))


async def watch(dashboard: httpx2.AsyncClient, application: str, since: float, heard: Callable[[Count], None]) -> None:
    """Tells the count twice a second until it is cancelled; a dashboard that is busy is asked again."""
    while True:
        with suppress(httpx2.HTTPError):
            heard(await count(dashboard, application, since))
        await asyncio.sleep(POLL_S)


def replica_seconds(counts: Sequence[Count]) -> float:
    """What was held, over the time that was watched."""
    pairs = pairwise(counts)
    return sum(before.held * (after.at_s - before.at_s) for before, after in pairs)
