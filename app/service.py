"""Everything a dialect may ask: generate, stream, models. Knows neither HTTP nor Ray; the router is handed to it."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from app.cache import Flights, fingerprint_aside, is_repeatable
from app.drawing import Drawing, GenerationResult, StreamEvent, told_at_once
from app.events import ASLEEP, Ending, ModelState, ReplicaEvent, Upscaled
from app.experiments.enrolment import Enrolment, Visit
from app.experiments.experiments import Experiments
from app.experiments.shadows import Shadows
from app.jobs.batches import BatchSubmission
from app.jobs.batching import Asked, naming
from app.jobs.job import Idempotency, Submission
from app.jobs.outbox import Outbox
from app.jobs.service import Delivery, Jobs
from app.keys.caller import current
from app.origin import Needs, Origin
from app.results.keeping import keep_enlarged
from app.results.results import Results
from models.card import ModelCard
from models.errors import GenerationFailed, InvalidRequest, NotFound, Unavailable
from models.images import ImageFormat
from models.parts import Upscale
from models.request import EffectiveRequest, GenerationRequest
from models.upscaler_card import UpscalerCard

REQUEST_S = 600.0  # that a request may take, unless said
STARTS_S = 1.0  # until a process that starts may know its models
GONE_RETRY_S = 1.0  # there is nothing to wait for: they are made anew
_ID = re.compile("[0-9a-f]{32}")


class Router(Protocol):
    """Brings a request to a replica of its model, and the replica's events back; ends a running one by its id."""

    def generate(self, request: EffectiveRequest, progress: bool, id: str) -> AsyncGenerator[ReplicaEvent, None]: ...

    async def origin(self, model: str, needs: Needs) -> Origin | None: ...

    async def end(self, ending: Ending, id: str) -> bool: ...

    async def state(self, model: str) -> ModelState: ...

    async def upscaler_state(self) -> ModelState: ...

    async def check_upscaler(self) -> None: ...

    async def upscale(self, picture: bytes, wanted: Upscale, format: ImageFormat) -> Upscaled: ...


class Fetcher(Protocol):
    """Brings the pictures at addresses, which requests may give in place of a picture; both by field."""

    async def pictures(self, addresses: Mapping[str, str]) -> Mapping[str, bytes]: ...


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

    def __init__(
        self,
        router: Router,
        fetcher: Fetcher | None = None,
        results: Results | None = None,
        jobs: Jobs | None = None,
        outbox: Outbox | None = None,
        patience_s: float = REQUEST_S,
        experiments: Experiments | None = None,
    ):
        """`patience_s` is how long a request waits for the same one of another."""
        self._router = router
        self._fetcher = fetcher
        self._results = results
        self._jobs, self._outbox = jobs, outbox
        self._drawing, self._unkept = Drawing(router, results), Drawing(router, None)
        self.experiments = experiments or Experiments()
        self.shadows = Shadows(self._draw_unkept)
        self._flights: Flights[GenerationResult] = Flights()
        self._patience_s = patience_s
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
        self._upscaler = replace(upscaler, models=self.upscaling_models) if upscaler else None

    @property
    def default_model(self) -> str:
        """The model of a request that names none."""
        return self._default_model

    def card(self, model: str) -> ModelCard:
        """A model's card. Raises NotFound listing the models there are, Unavailable before any is on offer."""
        self._check_offer()
        if model not in self._cards:
            raise NotFound(f"there is no model {model!r}; the models are: {', '.join(self._cards)}")
        return self._cards[model]

    async def pictures(self, addresses: Mapping[str, str]) -> Mapping[str, bytes]:
        """The encoded pictures at the addresses of a request's fields, by field. Raises InvalidRequest, Overloaded."""
        if self._fetcher is None:
            raise InvalidRequest(next(iter(addresses)), "must be base64: this server fetches no pictures")
        return await self._fetcher.pictures(addresses)

    @property
    def results(self) -> Results:
        """What was drawn. Raises NotFound where nothing is kept."""
        if self._results is None:
            raise NotFound("this server keeps no receipts")
        return self._results

    def check_urls(self) -> None:
        """Raises InvalidRequest where pictures cannot be given by address."""
        if self._results is None or not self._results.stores:
            raise InvalidRequest("response", "must be base64: this server keeps no pictures (`store`)")

    async def urls(self, result: GenerationResult | Upscaled) -> tuple[str, ...]:
        """Addresses of a result's pictures. Raises Unavailable where they could not be stored, or have just gone."""
        if not result.keys:
            raise result.fault or Unavailable(GONE_RETRY_S, "the pictures were not stored; send the request again")
        try:
            return await self.results.addresses(result.keys)
        except NotFound as gone:
            raise Unavailable(GONE_RETRY_S, "the pictures have just been removed; send the request again") from gone

    def enrol(self, request: GenerationRequest, visit: Visit) -> Enrolment:
        """Puts a request into the experiments that it belongs to, which decide what it leaves open."""
        return self.experiments.enrol(request, visit, self._draws)

    async def generate(
        self,
        request: GenerationRequest,
        *,
        cache: bool = True,
        urls: bool = False,
        shadows: Sequence[GenerationRequest] = (),
    ) -> GenerationResult:
        """Makes all pictures of a request. Raises the errors of models/errors.py.

        With `cache` the pictures may be those of the same request, earlier or at the same time, of the same caller;
        for `urls` they are stored in any case. `shadows` are drawn afterwards, for nobody.
        """
        return await _last(self.stream(request, progress=False, cache=cache, urls=urls, shared=True, shadows=shadows))

    async def stream(
        self,
        request: GenerationRequest,
        *,
        progress: bool = True,
        cache: bool = True,
        urls: bool = False,
        shared: bool = False,
        shadows: Sequence[GenerationRequest] = (),
    ) -> AsyncGenerator[StreamEvent, None]:
        """Makes all pictures of a request and tells how it goes: Accepted, Progress and Finished, GenerationResult.

        Unless it is `shared` it waits for nobody else's drawing, and nobody for it: who listens may be slow. Else it
        is as `generate`.
        """
        began, wanted = time.monotonic(), await self.resolve(request)
        about = await fingerprint_aside(wanted) if cache and is_repeatable(request) else None
        if about and shared:
            events = self._shared(wanted, about, began, progress, urls)
        else:
            events = self._drawing.events(wanted, began, progress, about, urls)
        async with aclosing(self.experiments.watched(wanted, began, events)) as watched:
            async for event in watched:
                if isinstance(event, GenerationResult) and not event.cached:
                    self.shadows.start(shadows, wanted.seed)
                yield event

    def _draws(self, request: GenerationRequest) -> bool:
        """Whether its model takes a request."""
        try:
            request.resolve(self.card(request.model))
        except (InvalidRequest, NotFound):
            return False
        return True

    async def _draw_unkept(self, request: GenerationRequest) -> None:
        """Draws a request that nobody sees and nothing is kept of."""
        began, wanted = time.monotonic(), await self.resolve(request)
        await _last(self.experiments.watched(wanted, began, self._unkept.events(wanted, began, False, None, False)))

    async def _shared(
        self, wanted: EffectiveRequest, about: str, began: float, progress: bool, urls: bool
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of a request that may be another's at the same time: of those who ask at a time, one draws.

        What others get is whole; who joins has a request of their own, which may have been ordered otherwise.
        """
        place = f"{current.get().id} {about}"
        patience_s = min(wanted.deadline_s or self._patience_s, self._patience_s)
        result = await self._flights.joined(place, patience_s)
        if result is not None:
            mine = {"id": uuid.uuid4().hex, "created": int(time.time()), "total_s": time.monotonic() - began}
            for event in told_at_once(replace(result, request=wanted, cached=True, **mine)):
                yield event
            return
        with self._flights.lead(place) as flight:
            async with aclosing(self._drawing.events(wanted, began, progress, about, urls)) as events:
                async for event in events:
                    if isinstance(event, GenerationResult) and event.whole:
                        flight.set_result(event)
                    yield event

    @property
    def upscaling_models(self) -> tuple[str, ...]:
        """The models that make pictures larger, and draw nothing else."""
        return tuple(name for name, card in self._cards.items() if card.upscaling)

    async def resolve(self, request: GenerationRequest) -> EffectiveRequest:
        """The request with everything decided, its seed too. Raises InvalidRequest, NotFound, GenerationFailed."""
        return await self._with_upscaler(request.resolve(self.card(request.model)))

    @property
    def jobs(self) -> Jobs:
        """The jobs. Raises NotFound where this server keeps none."""
        if self._jobs is None:
            raise NotFound("this server keeps no jobs; its operator can give the gateway a `store` and `jobs`")
        return self._jobs

    @property
    def outbox(self) -> Outbox:
        """The jobs' webhooks. Raises NotFound where this server keeps no jobs."""
        if self._outbox is None:
            raise NotFound("this server keeps no jobs, and sends no webhooks")
        return self._outbox

    async def submit(self, kind: str, request: GenerationRequest, delivery: Delivery) -> Submission:
        """Accepts a job that draws. Raises what `resolve` raises, Overloaded and Unavailable."""
        delivery = replace(delivery, cache=delivery.cache and is_repeatable(request))
        return await self.jobs.submit(kind, await self.resolve(request), delivery)

    async def submit_batch(
        self, lines: Sequence[tuple[str, str, GenerationRequest, Delivery]], idempotency: Idempotency | None
    ) -> BatchSubmission:
        """Accepts a job for each line: what its caller calls it, its path, its request, how its answer is to be.

        Raises InvalidRequest naming the line, GenerationFailed, Overloaded and Unavailable.
        """
        asked = []
        for number, (custom_id, url, request, delivery) in enumerate(lines, 1):
            with naming(number):
                wanted = await self.resolve(request)
            delivery = replace(delivery, cache=delivery.cache and is_repeatable(request))
            asked.append(Asked(custom_id=custom_id, url=url, request=wanted, delivery=delivery))
            await asyncio.sleep(0)  # the loop is everybody's, and there may be thousands
        return await self.jobs.batches.submit(asked, idempotency)

    async def submit_upscale(
        self, picture: bytes, wanted: Upscale, format: ImageFormat, delivery: Delivery
    ) -> Submission:
        """Accepts a job that enlarges. Raises InvalidRequest, NotFound, Overloaded and Unavailable."""
        card = self.upscaler
        wanted = card.resolve(wanted)
        await asyncio.to_thread(card.check, picture, wanted.scale, format)
        return await self.jobs.submit_upscale(picture, wanted, format, delivery)

    async def upscale(self, picture: bytes, wanted: Upscale, format: ImageFormat, *, urls: bool = False) -> Upscaled:
        """The encoded picture, enlarged, in that format, with its receipt; for `urls` it is stored.

        Raises the errors of models/errors.py.
        """
        card = self.upscaler
        wanted = card.resolve(wanted)
        await asyncio.to_thread(card.check, picture, wanted.scale, format)  # before it is sent anywhere
        upscaled = await self._router.upscale(picture, wanted, format)
        if self._results is None:
            return upscaled
        kept = await keep_enlarged(self._results, current.get().id, upscaled, wanted, pictures=urls)
        return replace(upscaled, **vars(kept))

    @property
    def upscaler(self) -> UpscalerCard:
        """What the upscaler can do. Raises NotFound where there is none."""
        if self._upscaler is None:
            models = ", ".join(self.upscaling_models)
            named = f", but models that make pictures larger: {models}" if models else ""
            raise NotFound(f"this server has no upscaler{named}")
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

    def _check_offer(self) -> None:
        """A process that was given no models yet does not say that there are none."""
        if not self._cards:
            raise Unavailable(STARTS_S, "the server has just started and has not been told its models yet")

    async def models(self) -> list[ModelDescription]:
        """Every model on offer, even while the offer changes. Raises Unavailable before there is any."""
        self._check_offer()
        cards, default = self._cards.values(), self._default_model
        return [await self._described(card, default) for card in cards]

    async def model(self, name: str) -> ModelDescription:
        """One model. Raises NotFound listing the models there are."""
        return await self._described(self.card(name), self._default_model)

    async def _described(self, card: ModelCard, default: str) -> ModelDescription:
        return ModelDescription(card=card, state=await self._router.state(card.name), default=card.name == default)

    async def sleeps(self, model: str | None = None) -> bool:
        """Whether a request would have to wait for the model, or without one the upscaler, to wake. Raises NotFound."""
        if model is None:
            return await self._router.upscaler_state() in ASLEEP
        return (await self.model(model)).state in ASLEEP

    def adapters(self) -> tuple[AdapterDescription, ...]:
        """What requests may name beside a model. Reads folders: not for an event loop.

        A model that makes pictures larger is among them, as an upscaler of nobody's pictures but its own requests'.
        """
        fits = dict.fromkeys(self._upscaler.names if self._upscaler else (), tuple(self._cards))
        fits |= {name: (name,) for name in self.upscaling_models}
        upscalers = (AdapterDescription(name=name, kind="upscaler", models=models) for name, models in fits.items())
        return (*self._adapters(), *upscalers)

    async def accept(self, id: str) -> None:
        """Ends a running request with the present estimate of each picture. Raises NotFound."""
        await self._end("accept", id)

    async def cancel(self, id: str) -> None:
        """Ends a running request without its pictures: who waits for them gets Cancelled. Raises NotFound."""
        await self._end("cancel", id)

    async def _end(self, ending: Ending, id: str) -> None:
        if not (_ID.fullmatch(id) and await self._router.end(ending, id)):
            raise NotFound("no request of that id is running; a stream's `queued` event tells the id")


async def _last(events: AsyncGenerator[StreamEvent, None]) -> GenerationResult:
    """What a stream comes to. Raises what it raises."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, GenerationResult):
                return event
    raise GenerationFailed("engine_fault", "the engine stopped answering before the pictures were finished")
