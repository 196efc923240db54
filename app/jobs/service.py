"""Jobs: what a dialect may ask of jobs. Each method acts for the current caller; an administrator sees everybody's."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Literal

from app.jobs import canonical, inputs, outputs
from app.jobs.batching import Batches, Charge, owner
from app.jobs.job import Idempotency, Job, JobEvent, NewJob, Page, Position, Submission, Webhook
from app.jobs.states import TERMINAL, State
from app.jobs.store import JobStore
from app.keys.budgets import pixel_steps
from app.keys.caller import current
from app.stores.store import Store
from models import document
from models.errors import InvalidRequest, Overloaded, Unavailable
from models.events import Finished
from models.images import ImageFormat
from models.parts import Upscale
from models.request import EffectiveRequest

UPSCALER = "upscaler"  # whose queue pictures to enlarge wait in
LOOK_S = (0.05, 0.5)  # between two looks at a job that somebody waits for: at first, and in the end
PACE_AGE_S = 5.0
ADDRESS_S = 3600  # how long a picture's address is good
OUTAGE_S = 120.0  # of the database, which whoever reads a job's events does not notice
_PRIORITIES = {"interactive": 0, "batch": -1}

Response = Literal["url", "base64"]
CheckAddress = Callable[[str, str], object]  # an address and the field that gave it


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How whoever submits a job hears of it: a webhook, pictures by address or in base64; and the idempotency key.

    With `cache` the pictures may be those of the same request of the same caller, drawn earlier.
    """

    webhook: Webhook | None = None
    response: Response = "url"
    cache: bool = True
    idempotency: Idempotency | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What waits before a job (None for one that does not wait), and seconds until it is done, where that is known."""

    position: Position | None
    eta_s: float | None


class Jobs:
    """Jobs and their pictures.

    `charge` takes what a request costs from its caller's budget, and tells how to give it back; `check_address` looks
    at where a webhook is to go; both may refuse.
    """

    def __init__(self, jobs: JobStore, pictures: Store, charge: Charge, check_address: CheckAddress):
        self._jobs, self._pictures, self._charge, self._check_address = jobs, pictures, charge, check_address
        self.batches = Batches(jobs, pictures, charge, self._promise)
        self._paces: dict[str, tuple[float, float | None]] = {}  # by model: when it was measured, and what came of it

    async def earlier(self, idempotency: Idempotency) -> Submission | None:
        """The job that this key has made before. Raises InvalidRequest where that was for another body."""
        return await self._jobs.earlier(current.get().id, idempotency)

    async def submit(self, kind: str, request: EffectiveRequest, delivery: Delivery) -> Submission:
        """Accepts a request to draw. Raises Overloaded, InvalidRequest, Unavailable."""
        self._check(delivery)
        if any(document.pictures(request)):
            await self._jobs.check_room(current.get().id)  # before they are stored
        return await self._charged(request, partial(self._submit, kind, request, delivery))

    async def _submit(self, kind: str, request: EffectiveRequest, delivery: Delivery) -> Submission:
        new, keys = await self._promise(kind, request, delivery)
        return await self._promised(new, keys, delivery)

    async def _promise(
        self, kind: str, request: EffectiveRequest, delivery: Delivery
    ) -> tuple[NewJob, tuple[str, ...]]:
        """The job of a request to draw, whose pictures are stored by then, and the keys of these."""
        caller, folder = current.get(), inputs.new_folder()
        keys = await inputs.keep(self._pictures, folder, document.pictures(request))
        pace = await self._pace(request.model)
        new = NewJob(
            owner=caller.id,
            at_once=caller.limits.concurrent_jobs,
            model=request.model,
            kind=kind,
            request={
                "response": delivery.response,
                "cache": delivery.cache,
                "request": canonical.to_json(request, keys),
            },
            inputs=folder if keys else None,
            priority=_PRIORITIES[request.priority],
            deadline_s=request.deadline_s,
            work=0.0 if pace is None else pace * pixel_steps(request),
            webhook=delivery.webhook,
        )
        return new, tuple(keys.values())

    async def submit_upscale(
        self, picture: bytes, wanted: Upscale, format: ImageFormat, delivery: Delivery
    ) -> Submission:
        """Accepts a picture to enlarge. Raises the same."""
        caller = current.get()
        self._check(delivery)
        await self._jobs.check_room(caller.id)
        folder, packed = inputs.new_folder(), await asyncio.to_thread(inputs.repacked, picture, "image")
        [key] = await inputs.keep_packed(self._pictures, folder, [packed])
        request = canonical.UpscaleRequest(key=key, upscale=wanted, output_format=format)
        new = NewJob(
            owner=caller.id,
            at_once=caller.limits.concurrent_jobs,
            model=UPSCALER,
            kind=canonical.UPSCALE,
            request={"response": delivery.response, "request": canonical.upscale_to_json(request)},
            inputs=folder,
            work=0.0,
            webhook=delivery.webhook,
        )
        return await self._promised(new, (key,), delivery)

    async def get(self, id: str) -> Job:
        """One job. Raises NotFound."""
        return await self._jobs.get(id, owner())

    async def list(
        self, states: Collection[State], model: str | None, kind: str | None, cursor: str | None, limit: int
    ) -> Page:
        """The caller's jobs, the newest first. Raises InvalidRequest."""
        return await self._jobs.list(owner(), states=states, model=model, kind=kind, cursor=cursor, limit=limit)

    async def cancel(self, id: str) -> Job:
        """Ends a queued job, has a running one stopped; a finished one stays. Raises NotFound."""
        return await self._jobs.cancel(id, owner())

    async def retry(self, id: str, idempotency: Idempotency | None) -> Submission:
        """A failed, cancelled or expired job anew, as another job, at the same cost.

        Raises NotFound, InvalidRequest, Overloaded.
        """
        job = await self.get(id)
        if idempotency is not None and (known := await self._jobs.earlier(job.owner, idempotency)) is not None:
            return known
        again = partial(self._jobs.retry, id, owner(), idempotency)
        if job.data_removed or canonical.is_upscale(job.request["request"]):
            return await again()
        return await self._charged(canonical.from_json(job.request["request"]), again)

    async def wait(self, id: str, seconds: float) -> Job:
        """The job once it has finished, or as it stands after so many seconds. Raises NotFound."""
        deadline, pause = time.monotonic() + seconds, LOOK_S[0]
        while not (job := await self.get(id)).finished and time.monotonic() < deadline:
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, LOOK_S[1])
        return job

    async def events(self, id: str, after_seq: int) -> AsyncGenerator[JobEvent | None, None]:
        """What happened to a job after an event, as it happens, up to its end; None at each look that found nothing.

        Raises NotFound, also when the job is forgotten in between, and Unavailable where the database was away for
        OUTAGE_S seconds.
        """
        ended, answered = False, time.monotonic()
        while not ended:
            try:
                found = await self._jobs.events(id, owner(), after_seq)
                over = not found and await self._is_over(id, after_seq)
                answered = time.monotonic()
            except Unavailable:
                if time.monotonic() - answered >= OUTAGE_S:
                    raise
                found, over = (), False
            for event in found:
                yield event
                after_seq, ended = event.seq, event.kind == "state" and event.data["state"] in TERMINAL
            if not found:
                ended = over
                yield None
                await asyncio.sleep(0.0 if ended else LOOK_S[1])

    async def _is_over(self, id: str, after_seq: int) -> bool:
        """Whether a job has ended, and nothing came after an event."""
        return (await self.get(id)).finished and not await self._jobs.events(id, owner(), after_seq, 1)

    async def estimate(self, job: Job) -> Estimate:
        """When a job will be done, by what its model's last jobs took; nothing where none was measured."""
        if job.finished:
            return Estimate(position=None, eta_s=None)
        if job.state is State.QUEUED:
            position = await self._jobs.position(job.id, None)
            return Estimate(position=position, eta_s=position.work + job.work if job.work else None)
        left = 1.0 - job.progress.done / max(job.progress.total, 1) if job.progress else 1.0
        return Estimate(position=None, eta_s=job.work * left if job.work else None)

    async def address(self, key: str) -> str | None:
        """An address of a stored picture, good for ADDRESS_S seconds; None where the store cannot sign one.

        Nobody looks whether the picture is still there: how a job stands is told while the store is away, too.
        """
        try:
            return await self._pictures.sign(key, ADDRESS_S)
        except Unavailable:
            return None

    async def data(self, key: str) -> bytes:
        """A stored picture. Raises NotFound."""
        return await self._pictures.get(key)

    async def pictures(self, job: Job) -> tuple[Finished, ...]:
        """All that a job has drawn so far, with its bytes. Raises NotFound."""
        return tuple([outputs.finished(output, await self.data(output["key"])) for output in job.outputs])

    async def _charged(self, request: EffectiveRequest, submit: Callable[[], Awaitable[Submission]]) -> Submission:
        """What comes of a submission whose request is paid for; given back where it makes no job."""
        give_back, made = await self._charge(request), False
        try:
            found = await submit()
            made = not found.replayed
            return found
        finally:
            if not made:
                await give_back()

    async def _promised(self, new: NewJob, keys: Collection[str], delivery: Delivery) -> Submission:
        """The job, whose pictures are stored by then; they go where there is surely no job that needs them."""
        try:
            found = await self._jobs.submit(new, delivery.idempotency)
        except (Overloaded, InvalidRequest):
            await inputs.drop(self._pictures, keys)
            raise
        if found.replayed:
            await inputs.drop(self._pictures, keys)
        return found

    def _check(self, delivery: Delivery) -> None:
        if delivery.webhook is not None:
            self._check_address(delivery.webhook.url, "webhook_url")

    async def _pace(self, model: str) -> float | None:
        """Seconds per pixel-step, by the model's last jobs: the time in which it worked at any, over what they had."""
        measured_at, pace = self._paces.get(model, (-PACE_AGE_S, None))
        if time.monotonic() - measured_at >= PACE_AGE_S:
            pace = _busy(await self._jobs.measured(model))
            self._paces[model] = time.monotonic(), pace
        return pace


def _busy(jobs: tuple[Job, ...]) -> float | None:
    """What jobs that ran beside each other took is counted once: they shared it."""
    costs = [(job, cost) for job in jobs if (cost := _cost(job)) is not None]
    spans = sorted((job.started_at, job.finished_at) for job, _ in costs if job.started_at and job.finished_at)
    busy, until = 0.0, 0.0
    for started, finished in spans:
        busy += max(0.0, finished - max(started, until))
        until = max(until, finished)
    cost = sum(cost for _, cost in costs)
    return busy / cost if cost else None


def _cost(job: Job) -> int | None:
    """A job's pixel-steps; None where another version wrote it, with fields that nobody knows here."""
    try:
        return pixel_steps(canonical.from_json(job.request["request"]))
    except InvalidRequest:
        return None
