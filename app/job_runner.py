"""The deployment that works on jobs: a runner, a deliverer of webhooks and a router of their own in a Serve replica."""

import asyncio
import contextvars
import logging
import os
import random
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import fields
from typing import Any

from app import stores
from app.database import Database
from app.dialects.native import payload
from app.drawing import GenerationResult
from app.experiments.experiments import Experiments
from app.experiments.store import ExperimentStore
from app.fetch import Fetcher
from app.jobs.making import Draw, DrawEvent, Drawn, Maker
from app.jobs.outbox import Outbox
from app.jobs.runner import Pace, Runner
from app.jobs.service import UPSCALER
from app.jobs.store import JobStore
from app.results.results import Results
from app.service import Service
from app.settings import START_S, CatalogueSettings, RunnerSettings
from app.webhooks.deliverer import Deliverer
from models.errors import HeliographError
from models.events import Finished, Progress
from models.request import EffectiveRequest

CLOSE_S = 25.0  # for handing jobs back, and for the webhooks under way
HOUSE_S = 3600.0  # between two looks for what is over its time
_DAY_S = 24 * 3600.0

_log = logging.getLogger(__name__)


class JobRunner:
    """Hosts a runner. The models come by `reconfigure`, so they change without a restart."""

    def __init__(self, settings: RunnerSettings):
        from app.exposure_counter import ExposureCounter  # these two need Ray
        from app.router import Router

        self._database = Database(settings.database)
        pictures = stores.opened(settings.store, stores.signing_secret(settings.secret_file))
        self._results = Results(self._database, pictures, settings.keep_results_s)
        # One replica only: who dies under a job is the job's affair, which another attempt has to answer for.
        router = Router(settings.request_timeout_s, attempts=1)
        kept = ExperimentStore(self._database)  # of jobs that got their arms when they were submitted
        counting = Experiments(kept, waits=True, count=ExposureCounter())
        patience_s = settings.request_timeout_s
        self._service = Service(router, results=self._results, patience_s=patience_s, experiments=counting)
        jobs = JobStore(self._database, payload=payload)
        maker = Maker(jobs, pictures, drawing(self._service), self._service.upscale)
        pace = Pace(
            at_once=settings.max_running,
            lease_s=settings.lease_s,
            keep_s=settings.keep_days * _DAY_S,
            forget_s=settings.forget_days * _DAY_S,
        )
        # In a container the process after this one may have the same number.
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._runner = Runner(name, jobs, maker, pace)
        self._deliverer = Deliverer(Outbox(self._database), Fetcher(settings.fetch))
        self._made_at = time.monotonic()
        self._working: tuple[asyncio.Task[None], ...] = ()
        self._keeping: tuple[asyncio.Task[None], ...] = ()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes over a new user_config: models and upscaler. Raises ValidationError, which fails the deployment."""
        catalogue = CatalogueSettings.model_validate(user_config)
        upscaler = catalogue.upscaler.card() if catalogue.upscaler else None
        self._service.offer(catalogue.cards(), catalogue.default_model, upscaler=upscaler)
        self._runner.offer((*catalogue.cards(), *([UPSCALER] if upscaler else [])))
        if not self._working:
            await self._database.migrate()
            self._working = (_lasting(self._runner.run()), _lasting(self._deliverer.run()))
            self._keeping = (_lasting(keep_house(self._results)),)

    def check_health(self) -> None:
        """Raises where the work has ended, or has not begun for long, so that Serve replaces the replica."""
        if not self._working and time.monotonic() - self._made_at > START_S:
            raise RuntimeError("the runner was not told its models, or could not begin; its log says why")
        if any(task.done() for task in (*self._working, *self._keeping)):
            raise RuntimeError("the runner has ended; its log says why")

    async def __del__(self) -> None:
        # Serve calls this, once, when the replica is to go.
        self._runner.stop()
        self._deliverer.stop()
        if self._working:
            await asyncio.wait(self._working, timeout=CLOSE_S)
        tasks = (*self._working, *self._keeping)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._database.close()


def drawing(service: Service) -> Draw:
    """The service as a maker sees it, who stands below it."""

    async def draw(request: EffectiveRequest, cache: bool) -> AsyncGenerator[DrawEvent, None]:
        async with aclosing(service.stream(request, cache=cache, shared=True)) as events:
            async for event in events:
                match event:
                    case GenerationResult():
                        yield Drawn(**{field.name: getattr(event, field.name) for field in fields(Drawn)})
                    case Progress() | Finished():
                        yield event

    return draw


async def keep_house(kept: Results) -> None:
    """Removes results whose time is over and pictures without an owner, every hour, from some time in the first on."""
    await asyncio.sleep(random.uniform(0.0, HOUSE_S))
    while True:
        try:
            await kept.keep_house()
        except (HeliographError, TimeoutError) as fault:
            _log.warning("the store is not swept: %s", fault)
        await asyncio.sleep(HOUSE_S)


def _lasting(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task with a clean context: Serve would cancel it with the request whose context it has."""
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())
