"""The deployment that runs a model: one engine in one thread behind an async generator.

torch is imported when a replica is made, never when this module is: Serve's own processes import it too.
"""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from app import endings
from app.errors import ReplicaDied
from app.events import Admitted, Ending, ReplicaEvent, Upscaled
from app.hint import Hint
from app.origin import Needs, Origin, Origins
from app.router import UpscalerRoute
from app.settings import ModelSettings, cores
from app.vitals import Vitals
from models import metadata
from models.errors import Cancelled, GenerationFailed, HeliographError, NotFound, Overloaded
from models.events import Event, Failed, Finished
from models.parts import Upscale
from models.request import EffectiveRequest

UPSCALING_TIMEOUT_S = 600.0  # of one picture, its wait for a busy upscaler included


class Model:
    """A model with its weights loaded and its engine running."""

    async def __init__(self, settings: ModelSettings):
        # Loading takes seconds: on Serve's event loop it would look like a replica that does not answer.
        start = partial(start_engine, settings, load=self.load)
        self._engine, self._facts = await asyncio.get_running_loop().run_in_executor(None, start)
        self._origins = await asyncio.get_running_loop().run_in_executor(None, origins, settings, self._engine)
        self._upscaler = UpscalerRoute()
        self._vitals = Vitals()

    @staticmethod
    def load(settings: ModelSettings) -> Any:
        """The family to serve. A benchmark's has a network that only takes time."""
        return load_family(settings)

    async def generate(
        self, request: EffectiveRequest, progress: bool, id: str, key: str = "", hint: Hint | None = None
    ) -> AsyncGenerator[ReplicaEvent, None]:
        """Runs one request under its id and yields its events, Admitted first. A caller who stops listening cancels it.
        `key` says whose it is. The engine knows it by another id: where a call seemed lost, the gateway may send the
        request here again before the first call's end has come, which must not end the second.

        Progress comes only where `progress` asks for it, since each event costs a millisecond on its way. The hint is
        what the call was routed by.

        A refusal is yielded as Failed, not raised, so that Serve's log has no stack trace for each full queue.
        """
        # Not bounded by a number because it is by nature: steps x samples events, and only the last pictures are large.
        events: asyncio.Queue[Event] = asyncio.Queue()
        chain = Chain(request, events, self._upscaler)
        loop = asyncio.get_running_loop()
        waiting, ticket = self._engine.load().waiting, uuid.uuid4().hex

        def submit() -> Origin:
            origin = self._origins.of(Needs.of(request))
            on_event = partial(loop.call_soon_threadsafe, chain.put)
            self._engine.submit(chain.first, on_event, progress=progress, id=ticket, key=key)
            self._vitals.note(hint or Hint.of(request))
            return origin

        # A sampler's first use compiles it, for up to a quarter of a second: not on the loop that others share.
        submitting = loop.run_in_executor(None, submit)
        try:
            origin = await asyncio.shield(submitting)
        except HeliographError as refusal:
            yield Failed(error=refusal)
            return
        except asyncio.CancelledError:
            submitting.add_done_callback(lambda _: self._engine.cancel(ticket))
            raise

        def end(ending: Ending) -> None:
            if ending == "accept":
                self._engine.accept(ticket)
            else:
                loop.call_soon_threadsafe(events.put_nowait, Failed(error=Cancelled()))

        try:
            with endings.alive(id, end), self._vitals.under_way():
                yield Admitted(waiting=waiting, origin=origin, seconds_per_work=self._pace)
                unfinished = request.samples
                while unfinished:
                    event = await events.get()
                    yield event
                    if isinstance(event, Failed):
                        return
                    unfinished -= isinstance(event, Finished)
        finally:
            self._engine.cancel(ticket)
            chain.close()

    async def origin(self, needs: Needs) -> AsyncGenerator[Origin | None, None]:
        """The origin that a picture drawn here now would have; None for a LoRA that is not there.

        A generator of one, so that the gateway's one handle serves for it too.
        """
        try:
            yield await asyncio.get_running_loop().run_in_executor(None, self._origins.of, needs)
        except NotFound:
            yield None

    def describe(self) -> dict[str, Any]:
        """What runs here and how busy it is."""
        load = self._engine.load()
        return self._facts | {
            "revision": self._engine.revision,
            "waiting": load.waiting,
            "running": load.running,
            "rows": load.rows,
            "forwards": load.forwards,
            "work_left": load.work_left,
            "seconds_per_work": load.seconds_per_work,
            "seconds_left": load.seconds_left,
        }

    @property
    def _pace(self) -> float:
        """Seconds per unit of work in full forwards."""
        return self._engine.pace.seconds_per_work(math.inf)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for it about once a second, for the autoscaling policy."""
        return self._vitals.autoscaling(self._engine.load(), self._pace)

    def record_routing_stats(self) -> dict[str, Any]:
        """Serve asks for it about once a second, for the routers of all handles."""
        return self._vitals.routing(self._engine.load(), self._pace)

    def check_health(self) -> None:
        """Raises when the engine can no longer work, so that Serve replaces the replica."""
        reason = self._engine.healthy()
        if reason is not None:
            raise RuntimeError(f"the engine is not healthy: {reason}")

    def __del__(self) -> None:
        # Serve calls this after the last request has left. An engine that never started is not there to close.
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()


class Chain:
    """Where a request's events go. With `upscale` in the request each finished picture first goes to the upscaler, from
    here and without waiting for the others, and comes back larger or as Failed; without it nothing is touched."""

    def __init__(self, request: EffectiveRequest, events: asyncio.Queue[Event], upscaler: UpscalerRoute):
        self._request, self._events, self._upscaler = request, events, upscaler
        self._under_way: set[asyncio.Task[None]] = set()
        self._one_by_one = asyncio.Lock()  # so that a request's own pictures do not fill the upscaler's queue
        self._closed = False

    @property
    def first(self) -> EffectiveRequest:
        """What the engine is to do of the request. PNG, because what is lost by packing would be enlarged as well; and
        without metadata, which tells of the picture in the end."""
        if not self._request.upscale:
            return self._request
        return replace(self._request, upscale=None, output_format="png", metadata="none")

    def put(self, event: Event) -> None:
        """Takes an event of the engine; on the event loop."""
        if self._closed:
            return
        if isinstance(event, Finished) and self._request.upscale:
            self._under_way.add(asyncio.get_running_loop().create_task(self._send_on(event)))
        else:
            self._events.put_nowait(event)

    async def _send_on(self, picture: Finished) -> None:
        request, began = self._request, time.monotonic()
        assert request.upscale is not None
        try:
            one = replace(request.sample(picture.index), stop_at_step=picture.stop_at_step or request.stop_at_step)
            # Hashes the input pictures, which may be large.
            text = await asyncio.to_thread(metadata.write, one, picture.revision, request.metadata)
            async with asyncio.timeout(UPSCALING_TIMEOUT_S), self._one_by_one:
                larger = await self._enlarged(picture.data, request.upscale, text)
        except TimeoutError:
            event: Event = Failed(error=GenerationFailed("deadline", "enlarging the picture took too long"))
        except ReplicaDied as death:  # others' requests are there too: this one has not been found guilty
            event = Failed(error=GenerationFailed(death.reason, death.message))
        except HeliographError as error:
            event = Failed(error=error)
        except Exception as fault:  # nobody else would hear of it, and the request would never end
            event = Failed(error=GenerationFailed("engine_fault", f"enlarging the picture failed: {fault!r}"))
        else:
            size = {"width": larger.width, "height": larger.height}
            timings = replace(picture.timings, upscale_s=time.monotonic() - began)
            event = replace(picture, data=larger.data, format=larger.format, timings=timings, **size)
        self._events.put_nowait(event)

    async def _enlarged(self, data: bytes, wanted: Upscale, text: dict[str, str]) -> Upscaled:
        """The picture, larger. What is drawn already is not thrown away because the upscaler is busy: it waits."""
        while True:
            try:
                return await self._upscaler.upscale(data, wanted, self._request.output_format, text)
            except Overloaded as busy:
                await asyncio.sleep(busy.retry_after_s)

    def close(self) -> None:
        """For a caller who left: what is under way at the upscaler is cancelled, and nothing more begins."""
        self._closed = True
        for task in self._under_way:
            task.cancel()


def load_family(settings: ModelSettings) -> Any:
    """The family of a model, with its weights on the device."""
    from models import families

    return families.load(
        family=settings.family,
        source=settings.located_source,
        revision=settings.revision,
        config=settings.config,
        device=settings.device,
        dtype=settings.dtype,
        offload=settings.offload,
        fp8=settings.fp8,
        graphs=settings.graphs,
        compiled=_folder(settings.compiled),
    )


def start_engine(
    settings: ModelSettings, warm_up: bool = True, load: Callable[[ModelSettings], Any] = load_family
) -> tuple[Any, dict[str, Any]]:
    """The engine of a model, loaded and running, and the facts about it that do not change."""
    import torch

    from models.engine import Engine, host
    from models.registered import Adapters

    # Ray sets OMP_NUM_THREADS from num_cpus, which counts for placement only.
    threads = settings.threads or cores()

    def make() -> Engine:
        torch.set_num_threads(threads)
        family = load(settings)
        adapters = Adapters(
            family,
            settings.located_adapters,
            settings.located_controlnets,
            preprocessors=settings.located_preprocessors,
            lora_bytes=settings.lora_cache_mib * 2**20,
        )
        engine = Engine(
            family,
            settings.card(),
            max_waiting=settings.max_waiting,
            max_wait_s=settings.max_wait_s,
            adapters=adapters,
        )
        if warm_up:
            engine.warm_up(settings.max_rows, settings.sizes, _folder(settings.measured))
        return engine

    return host(make), {"name": settings.name, "family": settings.family, "threads": threads}


def _folder(said: str | None) -> Path | None:
    return None if said is None else Path(said).expanduser()


def origins(settings: ModelSettings, engine: Any) -> Origins:
    """Where the pictures of an engine come from."""
    import torch

    placement = engine.family.placement
    device = str(placement.device)
    if placement.device.type == "cuda":
        device = f"{device} {torch.cuda.get_device_name(placement.device)}"
    dtype = str(placement.dtype).removeprefix("torch.") + ("+fp8" if placement.fp8 else "")
    return Origins(settings, engine.revision, device, dtype)
