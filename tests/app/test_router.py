"""What the router makes of Ray's failures, on handles that fail to order; real deaths are in tests/acceptance."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from app.events import Admitted
from app.router import Router, _state
from models.errors import GenerationFailed, HeliographError, Overloaded
from models.events import Finished, Progress
from models.request import EffectiveRequest, GenerationRequest
from tests.app.conftest import CARDS, TIMINGS


def finished(index: int) -> Finished:
    return Finished(
        index=index, seed=index, data=b"", format="png", width=8, height=8, revision="r", timings=TIMINGS
    )  # fmt: skip


def progress(index: int) -> Progress:
    return Progress(index=index, step=1, steps=2, forward=1, rows=2)


ADMITTED = Admitted(waiting=0, revision="r")


class Response:
    """What a streaming handle call gives: events, then an exception or the end."""

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
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Answers one script after the other."""

    def __init__(self, *scripts: list[Any]):
        self.responses = [Response(script) for script in scripts]
        self.requests: list[EffectiveRequest] = []
        self.ids: list[str] = []
        self.generate = SimpleNamespace(remote=self._remote)

    def _remote(self, request: EffectiveRequest, progress: bool, id: str) -> Response:
        self.requests.append(request)
        self.ids.append(id)
        return self.responses[len(self.requests) - 1]


@pytest.fixture
def routed() -> Callable[..., tuple[Router, Handle]]:
    def make(*scripts: list[Any], timeout_s: float = 5.0, state: str = "ready") -> tuple[Router, Handle]:
        router, handle = Router(timeout_s), Handle(*scripts)
        router._handles["sd15"] = handle

        async def of(_: str) -> str:
            return state

        router._states = SimpleNamespace(of=of)  # pyright: ignore[reportAttributeAccessIssue]
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
        (DeploymentUnavailableError(DeploymentID("Model", "model-sd15")), GenerationFailed),
    ],
)
async def test_serves_refusals_are_ours(routed, fault: Exception, kind: type[HeliographError]):
    router, _ = routed([fault])
    with pytest.raises(kind):
        await collect(router)


async def test_nothing_waits_for_ever(routed):
    router, handle = routed([ADMITTED, asyncio.Event], timeout_s=0.05)
    with pytest.raises(GenerationFailed) as failed:
        await collect(router)
    assert failed.value.reason == "deadline"
    assert handle.responses[0].cancelled


@pytest.mark.parametrize("state", ["missing", "failed"])
async def test_a_model_that_does_not_run_is_said_at_once(routed, state: str):
    router, handle = routed(state=state)
    with pytest.raises(GenerationFailed, match="does not run"):
        await collect(router)
    assert not handle.requests


@pytest.mark.parametrize(
    ("status", "replicas", "state"),
    [
        ("RUNNING", {"RUNNING": 1}, "ready"),
        ("UNHEALTHY", {"RUNNING": 1, "STARTING": 1}, "ready"),
        ("RUNNING", {}, "cold"),
        ("RUNNING", {"STARTING": 1}, "loading"),
        ("DEPLOYING", {}, "loading"),
        ("UNHEALTHY", {"STARTING": 1}, "loading"),
        ("UNHEALTHY", {}, "failed"),
        ("DEPLOY_FAILED", {"STARTING": 1}, "failed"),
    ],
)
def test_a_models_state_is_read_from_serves(status: str, replicas: dict[str, int], state: str):
    overview = SimpleNamespace(status=status, deployments={"Model": SimpleNamespace(replica_states=replicas)})
    assert _state(overview) == state


class Broadcast:
    """What `handle.broadcast` gives: the replicas' answers, or an exception in the place of all of them."""

    def __init__(self, answers: list[Any] | Exception):
        self._answers = answers

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0
        assert return_exceptions
        if isinstance(self._answers, Exception):
            raise self._answers
        return self._answers


@pytest.mark.parametrize(
    ("answers", "known"),
    [
        ([False, True], True),
        ([False, False], False),
        ([], False),
        ([ActorDiedError(), True], True),
        ([ActorDiedError()], False),
        (DeploymentUnavailableError(DeploymentID("Model", "model-sd15")), False),
        (TimeoutError(), False),
    ],
)
async def test_an_ending_reaches_every_replica(routed, answers: list[Any] | Exception, known: bool):
    router, handle = routed()
    told: list[tuple[str, str]] = []

    def broadcast(method: str, id: str) -> Broadcast:
        told.append((method, id))
        return Broadcast(answers)

    handle.broadcast = broadcast
    assert await router.tell(["sd15"], "accept", "id-1") is known
    assert told == [("accept", "id-1")]


async def test_a_model_that_is_not_awake_is_not_asked(routed):
    router, _ = routed(state="cold")
    assert await router.tell(["sd15"], "cancel", "id-1") is False
