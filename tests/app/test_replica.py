"""A replica's calls, on an engine that only remembers them; whole ones are in tests/acceptance."""

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from app import endings
from app.events import Admitted
from app.origin import Needs
from app.replica import Model, load_family, origins
from app.settings import ModelSettings
from app.vitals import Vitals
from models.errors import InvalidRequest
from models.events import Event, Finished
from models.pace import Pace
from models.request import EffectiveRequest, GenerationRequest
from models.weights import place
from tests.app.conftest import CARDS, ORIGIN, TIMINGS

PICTURE = Finished(index=0, seed=0, data=b"", format="png", width=8, height=8, revision="r", timings=TIMINGS)
BF16 = place("cpu", "bfloat16")
REQUEST = GenerationRequest(model="sd15", prompt="x", seed=0).resolve(CARDS["sd15"])


class Engine:
    """Its tickets, as the engine keeps them: whoever is not there any more hears nothing."""

    pace = Pace()

    def __init__(self) -> None:
        self.tickets: dict[str, Callable[[Event], None]] = {}
        self.accepted: list[str] = []
        self.accept = self.accepted.append

    def submit(self, request: EffectiveRequest, on_event: Callable[[Event], None], *, id: str, **_: Any) -> None:
        self.tickets[id] = on_event

    def cancel(self, id: str) -> None:
        self.tickets.pop(id, None)

    def load(self) -> Any:
        return SimpleNamespace(waiting=0)

    def finish(self) -> None:
        for tell in self.tickets.values():
            tell(PICTURE)

    def close(self) -> None:
        pass


def replica() -> tuple[Model, Engine]:
    made, engine = Model.__new__(Model), Engine()
    made._engine, made._vitals, made._upscaler = engine, Vitals(), cast(Any, None)
    made._origins = cast(Any, SimpleNamespace(of=lambda needs: ORIGIN))
    return made, engine


async def test_a_request_that_comes_again_is_not_ended_with_the_call_that_seemed_lost():
    made, engine = replica()
    async with aclosing(made.generate(REQUEST, False, "one")) as again:
        async with aclosing(made.generate(REQUEST, False, "one")) as lost:
            assert isinstance(await anext(lost), Admitted)
            assert isinstance(await anext(again), Admitted)
        engine.finish()
        assert await anext(again) == PICTURE
    assert not engine.tickets


async def test_whoever_knows_a_requests_id_can_end_it():
    made, engine = replica()
    async with aclosing(made.generate(REQUEST, False, "one")) as events:
        await anext(events)
        assert endings.end("accept", "one")
        assert engine.accepted == list(engine.tickets)
        assert not endings.end("accept", "another")


def test_what_a_model_draws_in_fp8_does_not_pass_for_what_it_draws_in_bfloat16():
    settings = ModelSettings(name="sd15", source="x")
    usual, eight = (
        origins(settings, SimpleNamespace(revision=revision, family=SimpleNamespace(placement=placement)))
        for revision, placement in (("abc", BF16), ("abc-fp8", replace(BF16, fp8=True)))
    )
    receipt = {"revision": "abc", "adapters": {}}
    assert usual.of(Needs()).drew(receipt)
    assert not eight.of(Needs()).drew(receipt)
    assert [each.of(Needs()).dtype for each in (usual, eight)] == ["bfloat16", "bfloat16+fp8"]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(("field", "reason"), [("fp8", "GPU"), ("graphs", "CUDA")])
def test_what_a_gpu_is_needed_for_is_refused_at_once_without_one(family: str, field: str, reason: str):
    settings = ModelSettings(
        name="it", family=family, source="nowhere", device="cpu", dtype="bfloat16", **{field: True}
    )
    with pytest.raises(InvalidRequest, match=reason) as refused:
        load_family(settings)
    assert refused.value.field == field


def test_a_folder_for_the_compiled_network_reaches_the_placement(tmp_path: Path):
    settings = ModelSettings(name="sd15", source="models/embedded/sd15", device="cpu", compiled=str(tmp_path))
    assert load_family(settings).placement.compiled == tmp_path
