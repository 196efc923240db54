"""Undisturbed pictures: the same requests drawn one after another by an engine in this process, without any server."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from app.replica import start_engine
from app.settings import ModelSettings
from models.request import GenerationRequest
from tests.faults.plan import PlannedJob


class Twins:
    """Draws what jobs have drawn."""

    def __init__(self, engine: Any, model: str):
        self._engine, self._model = engine, model

    async def of(self, job: PlannedJob) -> Sequence[bytes]:
        """The job's encoded pictures, by index."""
        body = {name: value for name, value in job.body.items() if name != "deadline_s"}
        [pictures] = await asyncio.to_thread(self._engine.generate, [GenerationRequest(model=self._model, **body)])
        return [picture.data for picture in pictures]


@asynccontextmanager
async def twins(settings: ModelSettings) -> AsyncIterator[Twins]:
    """An engine for as long as it is needed."""
    engine, _ = await asyncio.to_thread(start_engine, settings, warm_up=False)
    try:
        yield Twins(engine, settings.name)
    finally:
        await asyncio.to_thread(engine.close)
