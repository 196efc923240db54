"""What ends a request, as its arms are told of it."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any, cast

import pytest

from app.drawing import StreamEvent
from app.errors import NotRunning
from app.experiments.experiments import Experiments
from app.experiments.store import ExperimentStore, Exposure
from models.errors import GenerationFailed, HeliographError, Overloaded
from models.parts import ArmUse
from models.request import GenerationRequest
from tests.app.conftest import CARDS


class Written:
    """A store that remembers the errors it was told of."""

    def __init__(self) -> None:
        self.errors: list[str | None] = []

    async def record(self, seen: Sequence[Exposure]) -> None:
        self.errors += [one.error for one in seen]


async def failing(error: HeliographError) -> AsyncGenerator[StreamEvent, None]:
    raise error
    yield


@pytest.mark.parametrize(
    ("waits", "told"), [(False, ["overloaded", "replica_lost", "out_of_memory"]), (True, ["out_of_memory"])]
)
async def test_who_waits_for_a_model_has_not_failed(waits: bool, told: list[str]):
    """A job asks a model that is full every few seconds: that is one request, and not a hundred failed ones."""
    use = ArmUse(experiment="a", arm="b", assigned="b", version="v", unit="u")
    card = next(iter(CARDS.values()))
    wanted = GenerationRequest(model=card.name, prompt="a", experiments=(use,)).resolve(card)
    written = Written()
    experiments = Experiments(cast(ExperimentStore, cast(Any, written)), waits=waits)
    for error in (Overloaded(1.0), NotRunning("replica_lost"), GenerationFailed("out_of_memory")):
        with suppress(HeliographError):
            async for _ in experiments.watched(wanted, 0.0, failing(error)):
                pass
    assert written.errors == told
