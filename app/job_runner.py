"""The deployment that works on jobs: a runner, a deliverer of webhooks and a router of their own in a Serve replica."""

import asyncio
import contextvars
import os
import socket
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

from app import stores
from app.database import Database
from app.fetch import Fetcher
from app.jobs.making import Draw, DrawEvent, Drawn, Maker
from app.jobs.outbox import Outbox
from app.jobs.runner import Pace, Runner
from app.jobs.service import UPSCALER
from app.jobs.store import JobStore
from app.secret import derive, read_or_make
from app.service import GenerationResult, Service
from app.settings import CatalogueSettings, RunnerSettings
from app.webhooks.deliverer import Deliverer
from models.events import Finished, Progress
from models.request import EffectiveRequest

CLOSE_S = 25.0  # for handing jobs back, and for the webhooks under way
_DAY_S = 24 * 3600.0


class JobRunner:
    """Hosts a runner. The models come by `reconfigure`, so they change without a restart."""

    def __init__(self, settings: RunnerSettings):
        from app.router import Router  # the only thing here that needs Ray

        # One replica only: who dies under a job is the job's affair, which another attempt has to answer for.
        self._service = Service(Router(settings.request_timeout_s, attempts=1))
        self._database = Database(settings.database)
        jobs = JobStore(self._database)
        pictures = stores.opened(settings.store, derive(read_or_make(Path(settings.secret_file)), "pictures"))
        maker = Maker(jobs, pictures, drawing(self._service), self._service.upscale)
        pace = Pace(
            at_once=settings.max_running,
            lease_s=settings.lease_s,
            keep_s=settings.keep_days * _DAY_S,
            forget_s=settings.forget_days * _DAY_S,
        )
        self._runner = Runner(f"{socket.gethostname()}-{os.getpid()}", jobs, maker, pace)
        self._deliverer = Deliverer(Outbox(self._database), Fetcher(settings.fetch))
        self._working: tuple[asyncio.Task[None], ...] = ()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes over a new user_config: models and upscaler. Raises ValidationError, which fails the deployment."""
        catalogue = CatalogueSettings.model_validate(user_config)
        upscaler = catalogue.upscaler.card() if catalogue.upscaler else None
        self._service.offer(catalogue.cards(), catalogue.default_model, upscaler=upscaler)
        self._runner.offer((*catalogue.cards(), *([UPSCALER] if upscaler else [])))
        if not self._working:
            await self._database.migrate()
            self._working = (_lasting(self._runner.run()), _lasting(self._deliverer.run()))

    def check_health(self) -> None:
        """Raises where the work has ended, so that Serve replaces the replica."""
        if any(task.done() for task in self._working):
            raise RuntimeError("the runner has ended; its log says why")

    async def __del__(self) -> None:
        # Serve calls this, once, when the replica is to go.
        self._runner.stop()
        self._deliverer.stop()
        if self._working:
            await asyncio.wait(self._working, timeout=CLOSE_S)
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)
        await self._database.close()


def drawing(service: Service) -> Draw:
    """The service as a maker sees it, who stands below it."""

    async def draw(request: EffectiveRequest) -> AsyncGenerator[DrawEvent, None]:
        async with aclosing(service.stream(request)) as events:
            async for event in events:
                match event:
                    case GenerationResult(id=id, created=created, revision=revision, total_s=total_s):
                        yield Drawn(id=id, created=created, revision=revision, total_s=total_s)
                    case Progress() | Finished():
                        yield event

    return draw


def _lasting(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task with a clean context: Serve would cancel it with the request whose context it has."""
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())
