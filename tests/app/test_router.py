"""What the router makes of Ray's failures, on handles that fail to order; real deaths are in tests/acceptance."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, ObjectLostError, ObjectReconstructionFailedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from app import endings
from app.errors import NotRunning, ReplicaDied
from app.events import Admitted
from app.hint import Hint, Party
from app.keys.caller import Caller, Limits, current
from app.origin import Needs
from app.router import Router, UpscalerRoute, _state
from models.errors import Cancelled, DeadlineTooShort, GenerationFailed, HeliographError, Overloaded
from models.events import Failed, Finished, Progress
from models.parts import AdapterUse, Upscale
from models.request import EffectiveRequest, GenerationRequest
from models.work import work
from tests.app.conftest import CARDS, ORIGIN, TIMINGS


def finished(index: int) -> Finished:
    return Finished(
        index=index, seed=index, data=b"", format="png", width=8, height=8, revision="r", timings=TIMINGS
    )  # fmt: skip


def progress(index: int, step: int = 1) -> Progress:
    return Progress(index=index, step=step, steps=20, forward=1, rows=2)


ADMITTED = Admitted(waiting=0, origin=ORIGIN)


class Response:
    """What a streaming handle call gives: events, then an exception or the end.

    A script may wait for an asyncio.Event, `asyncio.Event` itself for ever, and call what tells how far it has come.
    """

    def __init__(self, script: list[Any]):
        self._script = iter(script)
        self.cancelled = False

    def __aiter__(self) -> "Response":
        return self

    async def __anext__(self) -> Any:
        item = next(self._script, StopAsyncIteration())
        if isinstance(item, BaseException):
            raise item
        if item is asyncio.Event:
            await asyncio.Event().wait()
        if isinstance(item, asyncio.Event):
            await item.wait()
            return await anext(self)
        if callable(item):
            item()
            return await anext(self)
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Answers one script after the other."""

    def __init__(self, *scripts: list[Any]):
        self.responses = [Response(script) for script in scripts]
        self.requests: list[EffectiveRequest] = []
        self.ids: list[str] = []
        self.hints: list[Hint] = []
        self.keys: list[str] = []
        self.generate = SimpleNamespace(remote=self._remote)

    def _remote(self, request: EffectiveRequest, progress: bool, id: str, key: str, hint: Hint) -> Response:
        self.requests.append(request)
        self.hints.append(hint)
        self.ids.append(id)
        self.keys.append(key)
        return self.responses[len(self.requests) - 1]


@pytest.fixture
def routed() -> Callable[..., tuple[Router, Handle]]:
    def make(
        *scripts: list[Any], timeout_s: float = 5.0, state: str = "ready", **settings: Any
    ) -> tuple[Router, Handle]:
        router, handle = Router(timeout_s, **settings), Handle(*scripts)
        router._handles["sd15"] = handle

        async def of(_: str) -> str:
            return state

        async def replicas(_: str) -> int:
            return int(state == "ready")

        router._states = SimpleNamespace(of=of, replicas=replicas)  # pyright: ignore[reportAttributeAccessIssue]
        return router, handle

    return make


REQUEST = GenerationRequest(model="sd15", prompt="x", seed=0, samples=2).resolve(CARDS["sd15"])


async def collect(router: Router, request: EffectiveRequest = REQUEST) -> list[Any]:
    return [event async for event in router.generate(request, True, "id-1")]


async def test_a_replica_that_dies_is_tried_once_more_without_repeating_pictures(routed):
    router, handle = routed(
        [ADMITTED, progress(0), finished(0), progress(1), ActorDiedError()],
        [ADMITTED, progress(0), progress(1), finished(1), finished(0)],
    )
    events = await collect(router)
    assert events == [ADMITTED, progress(0), finished(0), progress(1), progress(1), finished(1)]
    assert handle.requests[0].seed == handle.requests[1].seed
    assert all(response.cancelled for response in handle.responses)
    assert handle.ids == ["id-1", "id-1"]


@pytest.mark.parametrize(
    "fault",
    [
        NodeDiedError("gone"),
        ObjectLostError("00" * 28, None, ""),
        ObjectReconstructionFailedError("00" * 28, None, "", "it was an actor's"),
    ],
)
async def test_a_picture_that_is_lost_with_its_node_is_drawn_again(routed, fault: Exception):
    """A large one is fetched from where it was made, which may have died after telling of it."""
    router, _ = routed([ADMITTED, finished(0), fault], [ADMITTED, finished(0), finished(1)])
    assert await collect(router) == [ADMITTED, finished(0), finished(1)]


async def test_a_second_death_is_a_failure_that_may_be_retried(routed):
    router, _ = routed([ADMITTED, ActorDiedError()], [ActorDiedError()])
    with pytest.raises(GenerationFailed) as failed:
        await collect(router)
    assert failed.value.reason == "replica_lost"
    assert failed.value.retryable


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), Overloaded),
        (DeploymentUnavailableError(DeploymentID("Model", "model-sd15")), NotRunning),
    ],
)
async def test_serves_refusals_are_ours(routed, fault: Exception, kind: type[HeliographError]):
    router, _ = routed([fault])
    with pytest.raises(kind):
        await collect(router)


async def test_a_call_says_what_it_costs_and_what_it_wants_to_find(routed):
    router, handle = routed([ADMITTED, finished(0), finished(1)])
    await collect(router, replace(REQUEST, adapters=(AdapterUse(name="moon"), AdapterUse(name="ink"))))
    party = Party("anonymous", batch=False)
    assert handle.hints == [Hint(work=work(REQUEST), loras=("ink", "moon"), size="128x128", party=party)]


async def test_of_a_model_that_wakes_up_no_more_work_waits_here_than_may(routed):
    """The engine that was there last has told how long the work takes."""
    pace = 10.0 / work(REQUEST)
    told = replace(ADMITTED, seconds_per_work=pace)
    sent = asyncio.Event()
    first = [told, finished(0), finished(1)]
    router, handle = routed(first, [sent.set, asyncio.Event], [BackPressureError(1, 1)], state="cold", max_wait_s=25.0)
    await collect(router)
    waiting = asyncio.create_task(collect(router))
    await sent.wait()
    with pytest.raises(Overloaded) as refused:  # 10 s wait, and 20 s beside them would be too much
        await collect(router, replace(REQUEST, samples=4))
    assert "is waking up, and 10 s of work wait" in refused.value.message
    assert refused.value.retry_after_s == pytest.approx(5.0, abs=0.5)
    with pytest.raises(Overloaded) as refused:  # by Serve, whose bound is the safety net
        await collect(router)
    assert refused.value.retry_after_s == pytest.approx(20.0, abs=0.5)
    waiting.cancel()
    assert len(handle.requests) == 3


async def test_who_waits_alone_for_a_model_that_wakes_up_may_bring_any_work(routed):
    told = replace(ADMITTED, seconds_per_work=1000.0)
    drawn = [told, finished(0), finished(1)]
    router, _ = routed(drawn, drawn, state="loading", max_wait_s=1.0)
    for _ in range(2):
        assert len(await collect(router)) == 3


async def test_for_a_second_nobody_is_asked_again_what_would_be_drawn(routed, monkeypatch: pytest.MonkeyPatch):
    router, handle = routed()
    asked: list[Needs] = []

    def remote(needs: Needs) -> Response:
        asked.append(needs)
        return Response([replace(ORIGIN, revision=str(len(asked)))])

    handle.origin = SimpleNamespace(remote=remote)

    async def revision(needs: Needs) -> str:
        origin = await router.origin("sd15", needs)
        assert origin is not None
        return origin.revision

    assert [await revision(needs) for needs in (Needs(), Needs(), Needs(loras=("ink",)), Needs())] == [
        "1",
        "1",
        "2",
        "1",
    ]
    monkeypatch.setattr("app.router.ORIGIN_AGE_S", 0.0)
    assert await revision(Needs()) == "3"


async def test_nothing_waits_for_ever(routed):
    router, handle = routed([ADMITTED, asyncio.Event], timeout_s=0.05)
    with pytest.raises(GenerationFailed) as failed:
        await collect(router)
    assert failed.value.reason == "deadline"
    assert handle.responses[0].cancelled


@pytest.mark.parametrize("state", ["missing", "failed"])
async def test_a_model_that_does_not_run_is_said_at_once(routed, state: str):
    router, handle = routed(state=state)
    with pytest.raises(NotRunning, match="does not run"):
        await collect(router)
    assert not handle.requests


@pytest.mark.parametrize(
    ("status", "replicas", "state"),
    [
        ("RUNNING", {"RUNNING": 1}, "ready"),
        ("UNHEALTHY", {"RUNNING": 1, "STARTING": 1}, "ready"),
        ("RUNNING", {"PENDING_MIGRATION": 1, "STARTING": 1}, "ready"),
        ("RUNNING", {}, "cold"),
        ("RUNNING", {"STARTING": 1}, "loading"),
        ("DEPLOYING", {}, "loading"),
        ("UNHEALTHY", {"STARTING": 1}, "loading"),
        ("UNHEALTHY", {}, "failed"),
        ("DEPLOY_FAILED", {"STARTING": 1}, "failed"),
    ],
)
def test_a_models_state_is_read_from_serves(status: str, replicas: dict[str, int], state: str):
    of_model = "UNHEALTHY" if status == "UNHEALTHY" else "HEALTHY"
    model = SimpleNamespace(status=of_model, replica_states=replicas)
    front = SimpleNamespace(status="HEALTHY", replica_states={"RUNNING": 1})
    assert _state(SimpleNamespace(status=status, deployments={"Model": model})) == state
    assert _state(SimpleNamespace(status=status, deployments={"Front": front, "Model": model})) == state


def test_a_front_that_is_being_replaced_does_not_make_a_sleeping_model_a_failed_one():
    front = SimpleNamespace(status="UNHEALTHY", replica_states={"STARTING": 1})
    model = SimpleNamespace(status="HEALTHY", replica_states={})
    assert _state(SimpleNamespace(status="UNHEALTHY", deployments={"Front": front, "Model": model})) == "cold"


@pytest.mark.parametrize("state", ["missing", "failed"])
async def test_an_upscaler_that_does_not_run_is_known_without_asking_it(state: str):
    async def of_application(_: str) -> str:
        return state

    router = Router(5.0)
    router._upscaler = UpscalerRoute(SimpleNamespace(of_application=of_application))  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotRunning, match="the upscaler does not run at the moment") as failed:
        await router.check_upscaler()
    assert "leave out `upscale`" in failed.value.message
    assert failed.value.reason == "replica_lost"


class Deadly(UpscalerRoute):
    """The way to an upscaler whose replicas all die."""

    asked = 0

    async def _attempt(self, *_: Any, **__: Any) -> Any:
        self.asked += 1
        raise ActorDiedError


@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_picture_that_kills_the_upscaler_kills_no_more_replicas_than_there_are_attempts(attempts: int):
    router = Router(5.0, attempts)
    router._upscaler = route = Deadly()
    with pytest.raises(ReplicaDied):
        await router.upscale(b"", Upscale(), "png")
    assert route.asked == attempts


class Replica:
    """An actor whose process is asked to end a request, whether Serve still routes to it or not."""

    def __init__(self, answer: bool | Exception):
        self._answer = answer
        self.told: list[tuple[str, str]] = []
        self.__ray_call__ = SimpleNamespace(remote=self._remote)

    async def _remote(self, _: Any, ending: str, id: str) -> bool:
        self.told.append((ending, id))
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize(
    ("answers", "known"),
    [
        ([False, True], True),
        ([False, False], False),
        ([], False),
        ([ActorDiedError(), True], True),
        ([ActorDiedError()], False),
    ],
)
async def test_an_ending_reaches_every_replica_also_those_that_drain(routed, answers: list[Any], known: bool):
    router, _ = routed()  # whose handle knows none of them
    replicas = [Replica(answer) for answer in answers]
    router._replicas = lambda: replicas
    assert await router.end("accept", "id-1") is known
    assert all(replica.told == [("accept", "id-1")] for replica in replicas)


async def test_a_request_that_no_replica_has_at_the_moment_can_be_cancelled(routed):
    """Its replica has died, and the next one has not taken it yet."""
    sent = asyncio.Event()
    router, handle = routed([ADMITTED, ActorDiedError()], [sent.set, asyncio.Event], timeout_s=60.0)
    router._replicas = list
    asking = asyncio.create_task(collect(router))
    await sent.wait()
    assert await router.end("cancel", "id-1") is True
    with pytest.raises(Cancelled):
        await asyncio.wait_for(asking, 5)
    assert handle.responses[1].cancelled
    assert await router.end("cancel", "id-1") is False


async def test_a_request_cancelled_between_two_events_ends_there(routed):
    router, handle = routed([ADMITTED, progress(0), asyncio.Event], timeout_s=60.0)
    router._replicas = list
    events = router.generate(REQUEST, True, "id-1")
    assert await anext(events) == ADMITTED
    assert await router.end("cancel", "id-1")
    with pytest.raises(Cancelled):
        async with asyncio.timeout(5):
            [event async for event in events]
    assert handle.responses[0].cancelled


async def test_a_request_accepted_while_no_replica_has_it_ends_where_it_had_come_to(routed):
    router, handle = routed([ADMITTED, progress(0, 7), progress(1, 6), ActorDiedError()], [ADMITTED, finished(0)])
    router._replicas = list
    looking, found = asyncio.Event(), asyncio.Event()

    async def of(_: str) -> str:
        if handle.requests:
            looking.set()
            await found.wait()
        return "ready"

    router._states.of = of
    asking = asyncio.create_task(collect(router))
    await looking.wait()
    assert await router.end("accept", "id-1") is True
    found.set()
    *_, last = await asking
    assert [request.stop_at_step for request in handle.requests] == [None, 7]
    assert last.stop_at_step == 7  # the replica has drawn all that it was asked for


async def test_a_request_accepted_on_its_way_to_a_replica_is_accepted_there(routed):
    sent, arrived = asyncio.Event(), asyncio.Event()
    router, _ = routed([ADMITTED, progress(0, 7), ActorDiedError()], [sent.set, arrived, ADMITTED, finished(0)])
    replica = Replica(False)
    router._replicas = lambda: [replica]
    asking = asyncio.create_task(collect(router))
    await sent.wait()
    assert await router.end("accept", "id-1") is True
    arrived.set()
    await asking
    assert replica.told == [("accept", "id-1")] * 2


async def test_the_register_forgets_what_has_ended(routed):
    router, _ = routed([ADMITTED, finished(0), finished(1)])
    await collect(router)
    assert not endings._alive


async def test_a_replica_is_told_whose_the_request_is(routed):
    router, handle = routed([ADMITTED, finished(0), finished(1)], [ADMITTED, finished(0), finished(1)])
    await collect(router)
    before = current.set(Caller(id="somebody", name="ada", scopes=frozenset(), limits=Limits()))
    try:
        await collect(router)
    finally:
        current.reset(before)
    assert handle.keys == ["anonymous", "somebody"]


@pytest.mark.parametrize(("deadline_s", "told"), [(3.0, DeadlineTooShort), (6.0, GenerationFailed)])
async def test_a_deadline_is_the_callers_mistake_only_if_nobody_could_keep_it(routed, deadline_s, told):
    """Where part of it was lost on the way, as by a replica that died, it has passed."""
    router, _ = routed([ActorDiedError()], [Failed(error=DeadlineTooShort("deadline_s", "too short", 10.0))])
    [event] = await collect(router, replace(REQUEST, deadline_s=deadline_s))
    assert type(event.error) is told
