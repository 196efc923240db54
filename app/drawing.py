"""From a request in which everything is decided to its pictures: found among those that are kept, or drawn and kept."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from app.events import Admitted, ReplicaEvent, not_kept
from app.keys.caller import current
from app.origin import Needs, Origin
from app.results import receipt as receipts
from app.results.keeping import keep
from app.results.receipt import Drawn
from app.results.results import Result, Results
from models.errors import GenerationFailed, InvalidRequest, NotFound, Unavailable
from models.events import Failed, Finished, Progress, Timings
from models.limits import DEADLINE_S
from models.request import EffectiveRequest

LOOKUP_S = 2.0  # for a picture that is kept, before it is drawn anew
_UNCOUNTED = ("the exposure is not counted yet: the database does not answer",)


class Replicas(Protocol):
    """Brings a request to a replica of its model, and the replica's events back; tells where pictures come from."""

    def generate(self, request: EffectiveRequest, progress: bool, id: str) -> AsyncGenerator[ReplicaEvent, None]: ...

    async def origin(self, model: str, needs: Needs) -> Origin | None: ...


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A replica has taken the request on; the first thing a stream says."""

    id: str
    created: int
    request: EffectiveRequest
    revision: str
    waiting: int


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """All pictures of a request in order, and how they came about; the last thing a stream says.

    `cached` pictures were drawn for an earlier request of the same caller, or for one at the same time; others have an
    `origin`. `keys` are those of the pictures in the store, where they were stored; `fault` is what kept the receipt or
    the pictures from being kept. An `uncounted` one is of an experiment that has not heard of it yet.
    """

    id: str
    created: int
    request: EffectiveRequest
    revision: str
    images: tuple[Finished, ...]
    total_s: float
    cached: bool = False
    origin: Origin | None = None
    receipt_id: str | None = None
    keys: tuple[str, ...] = ()
    fault: Unavailable | None = None
    uncounted: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """The pictures' warnings, each once, and what could not be kept."""
        found = dict.fromkeys(warning for image in self.images for warning in image.warnings)
        return (*found, *not_kept(self.fault), *_UNCOUNTED[: self.uncounted])

    @property
    def whole(self) -> bool:
        """Whether it is what was asked for, and may be given to others who ask for the same.

        Not where it was ended early, nor where a replica died and others finished it with other weights.
        """
        origin = {self.revision if self.origin is None else self.origin.revision}
        ended = any(image.stop_at_step is not None for image in self.images)
        return not ended and {image.revision for image in self.images} == origin

    @property
    def timings(self) -> Timings:
        """The longest that any picture spent in each stage."""
        spent = [image.timings for image in self.images]
        return Timings(
            queued_s=max(t.queued_s for t in spent),
            encode_s=max(t.encode_s for t in spent),
            denoise_s=max(t.denoise_s for t in spent),
            decode_s=max(t.decode_s for t in spent),
            upscale_s=max((t.upscale_s for t in spent if t.upscale_s is not None), default=None),
        )


StreamEvent = Accepted | Progress | Finished | GenerationResult


class Drawing:
    """The way to the replicas, and to what they have drawn before for the same caller."""

    def __init__(self, replicas: Replicas, results: Results | None):
        self._replicas, self._results = replicas, results

    async def events(
        self, wanted: EffectiveRequest, began: float, progress: bool, about: str | None, urls: bool
    ) -> AsyncGenerator[StreamEvent, None]:
        """What happens to a request: it is found by its fingerprint, where `about` is that, or drawn and kept.

        Its deadline counts from when it `began`, by time.monotonic().
        """
        found = await self._found(wanted, about) if about else None
        if found is None:
            async with aclosing(self._draw(wanted, began, progress)) as events:
                async for event in events:
                    if isinstance(event, GenerationResult):
                        event = await self._kept(event, about if event.whole else None, urls)
                    yield event
            return
        for event in told_at_once(found):
            yield event

    async def _draw(self, wanted: EffectiveRequest, began: float, progress: bool) -> AsyncGenerator[StreamEvent, None]:
        started, created, id = time.monotonic(), int(time.time()), uuid.uuid4().hex
        images: dict[int, Finished] = {}
        origin: Origin | None = None
        async with aclosing(self._replicas.generate(_hurried(wanted, began), progress, id)) as events:
            async for event in events:
                match event:
                    case Admitted(waiting=waiting, origin=origin):
                        revision = origin.revision
                        yield Accepted(id=id, created=created, request=wanted, revision=revision, waiting=waiting)
                    case Failed(error=error):
                        raise error
                    case Finished(index=index):
                        images[index] = event
                        yield event
                    case Progress():
                        yield event
                if len(images) == wanted.samples:
                    break
        if len(images) < wanted.samples:
            raise GenerationFailed("engine_fault", "the engine ended the request without all of its pictures")
        yield GenerationResult(
            id=id,
            created=created,
            request=_as_ended(wanted, images.values()),
            revision=images[0].revision,
            images=tuple(images[index] for index in sorted(images)),
            total_s=time.monotonic() - started,
            origin=origin,
        )

    async def _found(self, wanted: EffectiveRequest, about: str) -> GenerationResult | None:
        """The pictures of the same request that are kept, where they are still what would be drawn. Where they cannot
        be had at once, drawing does without."""
        started = time.monotonic()
        if self._results is None or not self._results.stores:
            return None
        try:
            async with asyncio.timeout(LOOKUP_S):
                asking = self._replicas.origin(wanted.model, Needs.of(wanted))
                origin, kept = await asyncio.gather(asking, _looked_up(self._results, about))
        except (TimeoutError, Unavailable, NotFound, InvalidRequest):
            return None
        if origin is None or kept is None or not origin.drew(kept[0].receipt):
            return None
        result, images = kept
        return GenerationResult(
            id=uuid.uuid4().hex,
            created=int(time.time()),
            request=wanted,
            revision=origin.revision,
            images=images,
            total_s=time.monotonic() - started,
            cached=True,
            receipt_id=result.id,
            keys=result.keys,
        )

    async def _kept(self, result: GenerationResult, about: str | None, urls: bool) -> GenerationResult:
        if self._results is None or result.origin is None:
            return result
        drawn = Drawn(request=result.request, origin=result.origin, images=result.images)
        kept = await keep(self._results, current.get().id, drawn, about=about, pictures=urls)
        return replace(result, **vars(kept))


async def _looked_up(results: Results, about: str) -> tuple[Result, tuple[Finished, ...]] | None:
    """The newest result of a request with that fingerprint, with its pictures, whatever weights they were drawn with.

    Raises Unavailable, NotFound, InvalidRequest.
    """
    result = await results.find(current.get().id, about)
    if result is None:
        return None
    return result, await asyncio.to_thread(receipts.images, result.receipt, await results.files(result))


def told_at_once(result: GenerationResult) -> tuple[StreamEvent, ...]:
    """The events of a result that is there already."""
    accepted = Accepted(
        id=result.id, created=result.created, request=result.request, revision=result.revision, waiting=0
    )
    return accepted, *result.images, result


def _as_ended(request: EffectiveRequest, images: Iterable[Finished]) -> EffectiveRequest:
    """The request that draws what was drawn: where all pictures were ended at the same step, it stops there.

    Pictures that were ended at different steps are no one request's; each says its own.
    """
    ended = {image.stop_at_step for image in images}
    return replace(request, stop_at_step=ended.pop()) if len(ended) == 1 and None not in ended else request


def _hurried(request: EffectiveRequest, began: float) -> EffectiveRequest:
    """The request with the time that is left of its deadline."""
    if request.deadline_s is None:
        return request
    return replace(request, deadline_s=max(DEADLINE_S.low, request.deadline_s - (time.monotonic() - began)))
