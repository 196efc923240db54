"""Everything a dialect may ask: generate, stream, models. Knows neither HTTP nor Ray; the router is handed to it."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from app.events import Admitted, Ending, ModelState, ReplicaEvent, Upscaled
from app.jobs.job import Submission
from app.jobs.service import Delivery, Jobs
from models.card import ModelCard
from models.errors import GenerationFailed, InvalidRequest, NotFound
from models.events import Failed, Finished, Progress, Timings
from models.images import ImageFormat
from models.parts import Upscale
from models.request import EffectiveRequest, GenerationRequest
from models.upscaler_card import UpscalerCard

_ID = re.compile("[0-9a-f]{32}")


class Router(Protocol):
    """Brings a request to a replica of its model, and the replica's events back; ends a running one by its id."""

    def generate(self, request: EffectiveRequest, progress: bool, id: str) -> AsyncGenerator[ReplicaEvent, None]: ...

    async def end(self, ending: Ending, id: str) -> bool: ...

    async def state(self, model: str) -> ModelState: ...

    async def check_upscaler(self) -> None: ...

    async def upscale(self, picture: bytes, wanted: Upscale, format: ImageFormat) -> Upscaled: ...


class Fetcher(Protocol):
    """Brings the pictures at addresses, which requests may give in place of a picture; both by field."""

    async def pictures(self, addresses: Mapping[str, str]) -> Mapping[str, bytes]: ...


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
    """All pictures of a request in order, and how they came about; the last thing a stream says."""

    id: str
    created: int
    request: EffectiveRequest
    revision: str
    images: tuple[Finished, ...]
    total_s: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """The pictures' warnings, each once."""
        return tuple(dict.fromkeys(warning for image in self.images for warning in image.warnings))

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


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A model's card, whether it answers at once, and whether it is the one that is used when none is named."""

    card: ModelCard
    state: ModelState
    default: bool


@dataclass(frozen=True, kw_only=True)
class AdapterDescription:
    """Something that a request may name beside its model.

    `kind` is lora, controlnet and so on, `base` the architecture it was made for; hash and size are of its file, where
    it has one.
    """

    name: str
    kind: str
    models: tuple[str, ...]
    base: str | None = None
    sha256: str | None = None
    bytes: int | None = None


class Service:
    """The models by name and the way to their replicas."""

    def __init__(self, router: Router, fetcher: Fetcher | None = None, jobs: Jobs | None = None):
        self._router = router
        self._fetcher = fetcher
        self._jobs = jobs
        self._cards: dict[str, ModelCard] = {}
        self._default_model = ""
        self._adapters: Callable[[], Sequence[AdapterDescription]] = tuple
        self._upscaler: UpscalerCard | None = None

    def offer(
        self,
        cards: dict[str, ModelCard],
        default_model: str,
        adapters: Callable[[], Sequence[AdapterDescription]] = tuple,
        upscaler: UpscalerCard | None = None,
    ) -> None:
        """Replaces what is on offer; requests under way are not touched. `adapters` is asked anew for each list."""
        self._cards, self._default_model, self._adapters = dict(cards), default_model, adapters
        self._upscaler = upscaler

    @property
    def default_model(self) -> str:
        """The model of a request that names none."""
        return self._default_model

    def card(self, model: str) -> ModelCard:
        """A model's card. Raises NotFound listing the models there are."""
        if model not in self._cards:
            raise NotFound(f"there is no model {model!r}; the models are: {', '.join(self._cards)}")
        return self._cards[model]

    async def pictures(self, addresses: Mapping[str, str]) -> Mapping[str, bytes]:
        """The encoded pictures at the addresses of a request's fields, by field. Raises InvalidRequest, Overloaded."""
        if self._fetcher is None:
            raise InvalidRequest(next(iter(addresses)), "must be base64: this server fetches no pictures")
        return await self._fetcher.pictures(addresses)

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Makes all pictures of a request. Raises the errors of models/errors.py."""
        async with aclosing(self.stream(request, progress=False)) as events:
            async for event in events:
                if isinstance(event, GenerationResult):
                    return event
        raise GenerationFailed("engine_fault", "the engine stopped answering before the pictures were finished")

    async def stream(self, request: GenerationRequest, *, progress: bool = True) -> AsyncGenerator[StreamEvent, None]:
        """Makes all pictures of a request and tells how it goes: Accepted, Progress and Finished, GenerationResult."""
        started, created, id = time.monotonic(), int(time.time()), uuid.uuid4().hex
        effective = await self.resolve(request)
        images: dict[int, Finished] = {}
        async with aclosing(self._router.generate(effective, progress, id)) as events:
            async for event in events:
                match event:
                    case Admitted(waiting=waiting, revision=revision):
                        yield Accepted(id=id, created=created, request=effective, revision=revision, waiting=waiting)
                    case Failed(error=error):
                        raise error
                    case Finished(index=index):
                        images[index] = event
                        yield event
                    case Progress():
                        yield event
                if len(images) == effective.samples:
                    break
        if len(images) < effective.samples:
            raise GenerationFailed("engine_fault", "the engine ended the request without all of its pictures")
        yield GenerationResult(
            id=id,
            created=created,
            request=effective,
            revision=images[0].revision,
            images=tuple(images[index] for index in sorted(images)),
            total_s=time.monotonic() - started,
        )

    async def resolve(self, request: GenerationRequest) -> EffectiveRequest:
        """The request with everything decided, its seed too. Raises InvalidRequest, NotFound, GenerationFailed."""
        return await self._with_upscaler(request.resolve(self.card(request.model)))

    @property
    def jobs(self) -> Jobs:
        """The jobs. Raises NotFound where this server keeps none."""
        if self._jobs is None:
            raise NotFound("this server keeps no jobs; its operator can give the gateway a `store` and `jobs`")
        return self._jobs

    async def submit(self, kind: str, request: GenerationRequest, delivery: Delivery) -> Submission:
        """Accepts a job that draws. Raises what `resolve` raises, Overloaded and Unavailable."""
        return await self.jobs.submit(kind, await self.resolve(request), delivery)

    async def submit_upscale(
        self, picture: bytes, wanted: Upscale, format: ImageFormat, delivery: Delivery
    ) -> Submission:
        """Accepts a job that enlarges. Raises InvalidRequest, NotFound, Overloaded and Unavailable."""
        card = self.upscaler
        wanted = card.resolve(wanted)
        await asyncio.to_thread(card.check, picture, wanted.scale, format)
        return await self.jobs.submit_upscale(picture, wanted, format, delivery)

    async def upscale(self, picture: bytes, wanted: Upscale, format: ImageFormat) -> Upscaled:
        """The encoded picture, enlarged, in that format. Raises the errors of models/errors.py."""
        card = self.upscaler
        wanted = card.resolve(wanted)
        await asyncio.to_thread(card.check, picture, wanted.scale, format)  # before it is sent anywhere
        return await self._router.upscale(picture, wanted, format)

    @property
    def upscaler(self) -> UpscalerCard:
        """What the upscaler can do. Raises NotFound where there is none."""
        if self._upscaler is None:
            raise NotFound("this server has no upscaler")
        return self._upscaler

    async def _with_upscaler(self, request: EffectiveRequest) -> EffectiveRequest:
        """The request with its upscaler named; what could not be enlarged in the end is refused before it is drawn."""
        if request.upscale is None:
            return request
        upscale = self.upscaler.resolve(request.upscale, "upscale.")
        self.upscaler.check_input(*request.delivered, "width" if request.delivered == request.largest else "image")
        self.upscaler.enlarged(*request.delivered, upscale.scale, "upscale.")
        await self._router.check_upscaler()
        return replace(request, upscale=upscale)

    async def models(self) -> list[ModelDescription]:
        """Every model on offer."""
        return [await self.model(name) for name in self._cards]

    async def model(self, name: str) -> ModelDescription:
        """One model. Raises NotFound listing the models there are."""
        card = self.card(name)
        return ModelDescription(card=card, state=await self._router.state(name), default=name == self._default_model)

    def adapters(self) -> tuple[AdapterDescription, ...]:
        """What requests may name beside a model. Reads folders: not for an event loop."""
        upscalers = self._upscaler.names if self._upscaler else ()
        models = tuple(self._cards)
        return (*self._adapters(), *(AdapterDescription(name=n, kind="upscaler", models=models) for n in upscalers))

    async def accept(self, id: str) -> None:
        """Ends a running request with the present estimate of each picture. Raises NotFound."""
        await self._end("accept", id)

    async def cancel(self, id: str) -> None:
        """Ends a running request without its pictures: who waits for them gets Cancelled. Raises NotFound."""
        await self._end("cancel", id)

    async def _end(self, ending: Ending, id: str) -> None:
        if not (_ID.fullmatch(id) and await self._router.end(ending, id)):
            raise NotFound("no request of that id is running; a stream's `queued` event tells the id")
