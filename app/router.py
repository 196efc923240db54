"""From a model's name to its replicas and back: cached handles, deadlines, one retry when a replica dies, early ends.

Ray's exceptions end here: what leaves is an event or an error of models/errors.py.
"""

import asyncio
import contextvars
import math
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.request_router import ReplicaID
from ray.util import list_named_actors

from app import endings
from app.admission import Admission, Place
from app.errors import NotRunning, ReplicaDied
from app.events import Admitted, Ending, ModelState, ReplicaEvent, Upscaled
from app.hint import Hint
from app.keys.caller import current
from app.origin import Needs, Origin
from app.running import Running
from app.settings import (
    FRONT_DEPLOYMENT,
    MODEL_APPLICATION,
    MODEL_DEPLOYMENT,
    UPSCALER_APPLICATION,
    UPSCALER_DEPLOYMENT,
)
from models.errors import GenerationFailed, HeliographError, Overloaded
from models.events import Failed
from models.images import ImageFormat
from models.parts import Upscale
from models.request import EffectiveRequest

ATTEMPTS = 2
# What comes of a replica's death. A picture that it has handed over may still lie on its node, and be gone with that.
DEATHS = (RayActorError, ObjectLostError, NodeDiedError)
DEADLINE_GRACE_S = 1.0  # the engine notices a deadline first and says so better; this is for requests it never saw
STATUS_AGE_S = 1.0
STATUS_PATIENCE_S = 0.5
STATUS_TIMEOUT_S = 5.0  # where nothing is known yet
BACKPRESSURE_RETRY_S = 5.0  # where no pace is known yet
END_PATIENCE_S = 5.0  # a replica that is silent for longer is about to be replaced
_FRESH = 0.2  # what the latest picture counts in a running mean
ORIGIN_PATIENCE_S = 2.0  # a replica that takes longer to say so little had better draw
ORIGIN_AGE_S = 1.0  # asking takes longer than everything else that a picture from the cache does
ORIGINS = 1000  # that are remembered


class Router:
    """One per gateway process."""

    def __init__(self, request_timeout_s: float, attempts: int = ATTEMPTS, max_wait_s: float = math.inf):
        """`attempts` says to how many replicas a request is sent while they die, `max_wait_s` how much work may wait
        here for a model that sleeps, or has no room."""
        self._request_timeout_s = request_timeout_s
        self._admission = Admission(max_wait_s)
        self._attempts = attempts
        # Each `.options()` makes a router with its own long poll and metrics pusher: one handle per model, kept.
        self._handles: dict[str, Any] = {}
        self._origins: dict[tuple[str, Needs], tuple[Origin, float]] = {}
        self._states = _States()
        self._upscaler = UpscalerRoute(self._states)

    async def state(self, model: str) -> ModelState:
        """Whether the model answers at once, after loading, or not at all."""
        return await self._states.of(model)

    async def upscaler_state(self) -> ModelState:
        """The same of the upscaler."""
        return await self._states.of_application(UPSCALER_APPLICATION)

    async def check_upscaler(self) -> None:
        """Raises NotRunning where nothing enlarges: before a picture is drawn for it."""
        await self._upscaler.check("; leave out `upscale` to draw without it")

    async def upscale(self, picture: bytes, wanted: Upscale, format: ImageFormat) -> Upscaled:
        """The encoded picture, enlarged, in that format. Raises ReplicaDied where the last replica died too."""
        try:
            async with asyncio.timeout(self._request_timeout_s):
                return await self._upscaler.upscale(picture, wanted, format, attempts=self._attempts)
        except TimeoutError as late:
            raise GenerationFailed("deadline", "the picture was not enlarged in time") from late

    async def generate(self, request: EffectiveRequest, progress: bool, id: str) -> AsyncGenerator[ReplicaEvent, None]:
        """The events of a request. Pictures do not depend on where they are made (each has its own seed), so a request
        whose replica died is sent once more, and what was delivered already is left out. Raises ReplicaDied where the
        last one died too."""
        running = Running(request, self._patience_s(request))
        model, hint = request.model, Hint.of(request, current.get().id)
        with endings.alive(id, running.end), ExitStack() as stack:
            async with running.patience():
                replicas = await self._states.replicas(model)
            place = stack.enter_context(self._admission.place(model, hint.party.key, hint.work, replicas))
            for attempt in range(1, self._attempts + 1):
                try:
                    async with aclosing(self._attempt(running, progress, id, hint)) as events:
                        async for event in events:
                            _leave(place, event)
                            if not running.has_told(event):
                                yield event
                            running.note(event)
                    return
                except DEATHS as death:
                    if attempt == self._attempts:
                        raise ReplicaDied(
                            "replica_lost", "the replica died while it worked on the request; send it again"
                        ) from death

    async def origin(self, model: str, needs: Needs) -> Origin | None:
        """What a picture would come from that were drawn now, by what a replica has said within a second; None
        where none says so at once."""
        known, said_at = self._origins.get((model, needs), (None, -math.inf))
        if time.monotonic() - said_at < ORIGIN_AGE_S:
            return known
        origin = await self._ask_origin(model, needs)
        if origin is not None:
            if len(self._origins) >= ORIGINS:
                self._origins.clear()
            self._origins[model, needs] = origin, time.monotonic()
        return origin

    async def _ask_origin(self, model: str, needs: Needs) -> Origin | None:
        response = None
        try:
            async with asyncio.timeout(ORIGIN_PATIENCE_S):
                if await self.state(model) != "ready":  # asking would wake it
                    return None
                response = (await self._handle(model)).origin.remote(needs)
                return await anext(response, None)
        except (TimeoutError, RayError, RayServeException, HeliographError):  # drawing will tell what is wrong
            return None
        finally:
            if response is not None:
                response.cancel()

    async def end(self, ending: Ending, id: str) -> bool:
        """Ends a request, wherever it is. False where nobody has it.

        Every replica is asked, of gateways and of models: another gateway may have the request; its replica may have
        died, so that only its gateway has it at the moment, or drain, so that no handle leads there.
        """
        here = endings.end(ending, id)
        if here and ending == "cancel":  # the gateway that has the request takes it back from the replica
            return True
        return await self._ask(ending, id) or here

    async def _ask(self, ending: Ending, id: str) -> bool:
        """Whether a replica has the request; those that are silent count as not."""
        try:
            async with asyncio.timeout(END_PATIENCE_S):
                replicas = await asyncio.get_running_loop().run_in_executor(None, self._replicas)
                for answer in asyncio.as_completed([_answer(replica, ending, id) for replica in replicas]):
                    if await answer:
                        return True
        except (TimeoutError, RayError):  # Ray's own services are silent, or being replaced
            pass
        return False

    def _replicas(self) -> list[Any]:
        """The actors of all replicas of all deployments. Blocks."""
        found = []
        named: list[Any] = list_named_actors(all_namespaces=True)
        for actor in named:
            if ReplicaID.is_full_id_str(actor["name"]):
                try:
                    found.append(ray.get_actor(actor["name"], actor["namespace"]))
                except ValueError:  # gone since
                    continue
        return found

    def _patience_s(self, request: EffectiveRequest) -> float:
        if request.deadline_s is None:
            return self._request_timeout_s
        return min(self._request_timeout_s, request.deadline_s + DEADLINE_GRACE_S)

    async def _attempt(
        self, running: Running, progress: bool, id: str, hint: Hint
    ) -> AsyncGenerator[ReplicaEvent, None]:
        model, response = running.request.model, None
        try:
            async with running.patience():
                handle = await self._handle(model)
            accepted = running.accepted
            sent = running.request
            response = handle.generate.remote(sent, progress, id, current.get().id, hint=hint)
            while True:
                async with running.patience():
                    event = await anext(response, None)
                if event is None:
                    return
                if isinstance(event, Admitted) and running.accepted and not accepted:  # while no replica knew of it
                    await self.end("accept", id)
                yield running.told(event, sent)
        except DEATHS:
            raise
        except (RayError, RayServeException) as fault:
            raise _typed(fault, f"model {model}", self._admission.retry_after_s(model, BACKPRESSURE_RETRY_S)) from fault
        finally:
            if response is not None:
                response.cancel()

    async def _handle(self, model: str) -> Any:
        """The model's handle, made on first use. Raises NotRunning where nothing runs the model."""
        state = await self._states.of(model)
        if state in ("missing", "failed"):
            self._handles.pop(model, None)
            raise _unavailable(f"model {model}", state)
        if model not in self._handles:
            make = partial(serve.get_deployment_handle, MODEL_DEPLOYMENT, app_name=MODEL_APPLICATION.format(name=model))
            handle = await asyncio.get_running_loop().run_in_executor(None, make)
            self._handles.setdefault(model, handle.options(stream=True))
        return self._handles[model]


class UpscalerRoute:
    """The way to the upscaler's replicas, for the gateway and for the replicas of models. It asks once more where a
    replica died: the same picture comes of it."""

    def __init__(self, states: "_States | None" = None):
        self._states = states or _States()
        self._handle: Any = None
        self._picture_s = BACKPRESSURE_RETRY_S  # that a picture has taken lately, its wait included

    async def check(self, way_out: str = "") -> None:
        """Raises NotRunning, and names the way out, where nothing runs or wakes that enlarges."""
        state = await self._states.of_application(UPSCALER_APPLICATION)
        if state in ("missing", "failed"):
            self._handle = None
            raise _unavailable("the upscaler", state, way_out)

    async def upscale(
        self,
        picture: bytes,
        wanted: Upscale,
        format: ImageFormat,
        text: Mapping[str, str] | None = None,
        attempts: int = ATTEMPTS,
    ) -> Upscaled:
        """The encoded picture, enlarged, in that format and with these texts in it. Raises ReplicaDied."""
        try:
            answer = await self._attempt(picture, wanted, format, text)
        except DEATHS as death:
            if attempts > 1:
                return await self.upscale(picture, wanted, format, text, attempts - 1)
            raise ReplicaDied(
                "replica_lost", "the upscaler died while it worked on the picture; send it again"
            ) from death
        if isinstance(answer, Failed):
            raise answer.error
        return answer

    async def _attempt(
        self, picture: bytes, wanted: Upscale, format: ImageFormat, text: Mapping[str, str] | None
    ) -> Upscaled | Failed:
        await self.check()
        if self._handle is None:
            make = partial(serve.get_deployment_handle, UPSCALER_DEPLOYMENT, app_name=UPSCALER_APPLICATION)
            handle = await asyncio.get_running_loop().run_in_executor(None, make)
            self._handle = self._handle or handle
        began, response = time.monotonic(), self._handle.upscale.remote(picture, wanted, format, text)
        try:
            answer = await response
            self._picture_s += _FRESH * (time.monotonic() - began - self._picture_s)
            return answer
        except DEATHS:
            raise
        except (RayError, RayServeException) as fault:
            raise _typed(fault, "the upscaler", self._picture_s) from fault
        finally:
            response.cancel()


class _States:
    """What Serve says of each application, asked at most once a second: its controller is one busy process.

    Nobody waits long for the answer: a controller that is being replaced is silent, and replicas work without it.
    """

    def __init__(self):
        self._known: dict[str, ModelState] = {}
        self._replicas: dict[str, int] = {}
        self._asked_at = -STATUS_AGE_S
        self._asking: asyncio.Task[None] | None = None

    async def of(self, model: str) -> ModelState:
        return await self.of_application(MODEL_APPLICATION.format(name=model))

    async def replicas(self, model: str) -> int:
        """How many work on requests."""
        await self.of(model)
        return self._replicas.get(MODEL_APPLICATION.format(name=model), 0)

    async def of_application(self, name: str) -> ModelState:
        if self._asking is None and time.monotonic() - self._asked_at >= STATUS_AGE_S:
            # A clean context: the answer is for everybody, so it must not be cancelled with one request.
            self._asking = asyncio.get_running_loop().create_task(self._ask(), context=contextvars.Context())
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=STATUS_PATIENCE_S if self._known else STATUS_TIMEOUT_S)
        return self._known.get(name, "missing")

    async def _ask(self) -> None:
        try:
            status = await asyncio.get_running_loop().run_in_executor(None, serve.status)
            self._known = {name: _state(overview) for name, overview in status.applications.items()}
            self._replicas = {name: _working(_replicas(overview)) for name, overview in status.applications.items()}
        except (RayError, RayServeException):
            pass  # what was known stays known
        finally:
            self._asking, self._asked_at = None, time.monotonic()


def _working_deployment(overview: Any) -> Any:
    """The one of an application that works; None while it has none yet."""
    return next((told for name, told in overview.deployments.items() if name != FRONT_DEPLOYMENT), None)


def _replicas(overview: Any) -> Mapping[str, int]:
    """How many are in each state."""
    deployment = _working_deployment(overview)
    return deployment.replica_states if deployment else {}


def _working(replicas: Mapping[str, int]) -> int:
    """On a node that drains, a replica works on until another one has taken its place."""
    return replicas.get("RUNNING", 0) + replicas.get("PENDING_MIGRATION", 0)


def _state(overview: Any) -> ModelState:
    replicas = _replicas(overview)
    if _working(replicas):
        return "ready"
    if overview.status in ("DEPLOY_FAILED", "DELETING"):
        return "failed"
    if any(replicas.get(state) for state in ("STARTING", "UPDATING", "RECOVERING")):
        return "loading"
    if overview.status in ("DEPLOYING", "NOT_STARTED"):
        return "loading"
    told = _working_deployment(overview) or overview
    return "failed" if told.status == "UNHEALTHY" else "cold"


async def _answer(replica: Any, ending: Ending, id: str) -> bool:
    try:
        return await replica.__ray_call__.remote(_end, ending, id)
    except RayError:  # it died: nothing runs there any more
        return False


def _end(_: Any, ending: Ending, id: str) -> bool:
    """Runs in the replica's process; Ray hands it the actor."""
    return endings.end(ending, id)


def _unavailable(what: str, state: str, way_out: str = "") -> NotRunning:
    why = "its application is not deployed" if state == "missing" else "it failed to start; see `serve status`"
    return NotRunning("replica_lost", f"{what} does not run at the moment: {why}{way_out}")


def _leave(place: Place, event: ReplicaEvent) -> None:
    """Once an engine has the request, it counts among what the engine knows of."""
    if isinstance(event, Admitted):
        place.leave(event.seconds_per_work)


def _typed(fault: Exception, what: str, retry_after_s: float) -> HeliographError:
    """One of our errors for one of Ray's."""
    if isinstance(fault, RayTaskError) and isinstance(fault.cause, HeliographError):
        return fault.cause
    if isinstance(fault, BackPressureError):
        return Overloaded(retry_after_s, f"too many requests wait for {what}")
    if isinstance(fault, DeploymentUnavailableError):
        return _unavailable(what, "failed")
    return GenerationFailed("engine_fault", f"the replica of {what} failed on the request; send it again")
