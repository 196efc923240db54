"""Maker: from an attempt to the result of its job. It is handed what draws and enlarges, and keeps the pictures."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from app.errors import RETRY_AFTER_S, NotRunning
from app.events import Upscaled
from app.jobs import canonical, inputs, outputs
from app.jobs.attempt import Attempt, NotNow
from app.jobs.job import JobProgress
from app.jobs.store import JobStore
from app.keys.caller import Caller, Limits, current
from app.stores.store import Store
from models.errors import GenerationFailed, InvalidRequest, Overloaded, Unavailable
from models.events import Finished, Progress
from models.images import ImageFormat
from models.limits import DEADLINE_S
from models.parts import Upscale
from models.request import EffectiveRequest

T = TypeVar("T")

DATABASE_PAUSE_S = 0.5
READINGS = 40  # attempts to read a request that another version wrote: no update takes longer


@dataclass(frozen=True, kw_only=True)
class Patience:
    """With what is busy or away, in seconds.

    `store_s` are the pauses before a picture is put into the store again, which saves drawing it again; `busy_s` the
    shortest and the longest pause before a model that is busy or does not run is asked again; `model_s` is how long
    that goes on before the job is handed back.
    """

    store_s: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    busy_s: tuple[float, float] = (1.0, 15.0)
    model_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """All pictures of a request are there: what remains to be said of it. The last thing that `draw` tells.

    `cached` pictures were drawn for an earlier request.
    """

    id: str
    created: int
    revision: str
    total_s: float
    cached: bool = False
    receipt_id: str | None = None


DrawEvent = Progress | Finished | Drawn
Draw = Callable[[EffectiveRequest, bool], AsyncGenerator[DrawEvent, None]]  # and whether it may be one drawn before


class Enlarge(Protocol):
    """The encoded picture, enlarged, in that format."""

    async def __call__(self, picture: bytes, wanted: Upscale, format: ImageFormat) -> Upscaled: ...


class Maker:
    """Makes what jobs promise."""

    def __init__(self, jobs: JobStore, pictures: Store, draw: Draw, enlarge: Enlarge, patience: Patience | None = None):
        self._jobs, self._pictures, self._draw, self._enlarge = jobs, pictures, draw, enlarge
        self._patience = patience or Patience()

    async def __call__(self, attempt: Attempt) -> Mapping[str, Any]:
        """The result of the attempt's job; its pictures are told to the job one by one before that.

        Raises Stale, NotNow, and the errors of models/errors.py.
        """
        owner = attempt.job.owner
        current.set(Caller(id=owner, name=owner, scopes=frozenset(), limits=Limits()))  # of this task alone
        made = self._enlarged if canonical.is_upscale(attempt.job.request["request"]) else self._drawn
        until = time.monotonic() + self._patience.model_s
        while True:
            try:
                return await made(attempt)
            except (Overloaded, NotRunning) as away:
                if time.monotonic() >= until:
                    raise NotNow from away
                pause_s = away.retry_after_s if isinstance(away, Overloaded) else RETRY_AFTER_S
                shortest, longest = self._patience.busy_s
                await asyncio.sleep(min(max(pause_s, shortest), longest))

    async def _drawn(self, attempt: Attempt) -> Mapping[str, Any]:
        steps: dict[int, int] = {}
        request = await self._request(attempt)
        cache = bool(attempt.job.request.get("cache", False))
        async with aclosing(self._draw(request, cache)) as events:
            async for event in events:
                match event:
                    case Progress(index=index, step=step):
                        steps[index] = step
                        attempt.progress = _progress(steps, event.steps * request.samples)
                    case Finished():
                        await self._tell(attempt, partial(outputs.keep, self._pictures, *_place(attempt), event))
                    case Drawn():
                        return asdict(event)
        raise GenerationFailed("engine_fault", "the engine stopped answering before the pictures were finished")

    async def _request(self, attempt: Attempt) -> EffectiveRequest:
        """With its pictures, and with the time that is left of its deadline."""
        values = attempt.job.request["request"]
        pictures = await inputs.load(self._pictures, values)
        request = await self._read(attempt, lambda: canonical.from_json(values, pictures.__getitem__))
        left_s = attempt.left_s
        if left_s is not None and left_s <= 0:
            raise GenerationFailed("deadline", "the pictures were not finished in time")
        return replace(request, deadline_s=None if left_s is None else max(DEADLINE_S.low, left_s), preview_every=0)

    async def _read(self, attempt: Attempt, reading: Callable[[], T]) -> T:
        """The request. Where another version wrote it, as during an update, a runner of that version may read it."""
        try:
            return reading()
        except (InvalidRequest, TypeError) as unknown:  # TypeError: a field of a part of the request
            if attempt.claim.attempt < READINGS:
                await asyncio.sleep(self._patience.busy_s[1])
                raise NotNow from unknown
            raise InvalidRequest("request", f"was written by another version: {unknown}") from unknown

    async def _enlarged(self, attempt: Attempt) -> Mapping[str, Any]:
        began = time.monotonic()
        values = attempt.job.request["request"]
        request = await self._read(attempt, lambda: canonical.upscale_from_json(values))
        picture = await self._pictures.get(request.key)
        upscaled = await self._enlarge(picture, request.upscale, request.output_format)
        await self._tell(attempt, partial(outputs.keep_upscaled, self._pictures, *_place(attempt), upscaled))
        told = {"created": int(time.time()), "receipt_id": upscaled.receipt_id}
        return told | {"total_s": time.monotonic() - began}

    async def _tell(self, attempt: Attempt, keep: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        """Keeps a picture and tells the job of it. The database may be away for a while; heartbeats say if for long."""
        output = await _persist(keep, self._patience.store_s)
        while True:
            try:
                await self._jobs.output(attempt.claim, output)
                return
            except Unavailable:
                await asyncio.sleep(DATABASE_PAUSE_S)


def _place(attempt: Attempt) -> tuple[str, int]:
    return attempt.claim.id, attempt.claim.attempt


def _progress(steps: Mapping[int, int], total: int) -> JobProgress:
    done = sum(steps.values())
    return JobProgress(done=min(done, total), total=total, phase="denoising" if done < total else "decoding")


async def _persist(keep: Callable[[], Awaitable[T]], pauses_s: Sequence[float]) -> T:
    """Raises Unavailable once the store has failed for as long as all pauses take."""
    for pause_s in pauses_s:
        try:
            return await keep()
        except Unavailable:
            await asyncio.sleep(pause_s)
    return await keep()
