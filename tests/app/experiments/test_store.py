"""Exposures and outcomes on both databases: written once, found by their owner alone, added up by unit."""

import asyncio

import pytest

from app.experiments.store import ExperimentStore, Sums, check_outcome
from models.errors import InvalidRequest, NotFound
from tests.app.experiments.conftest import exposure


async def test_exposures_are_added_up_by_arm(store: ExperimentStore):
    await store.record(
        [
            exposure(1, total_s=1.0),
            exposure(2, unit="unit-1", total_s=3.0, engine_s=1.5),
            exposure(3, total_s=None, engine_s=0.0, error="overloaded", receipt_id=None),
            exposure(4, "fast"),
            exposure(5, "control", assigned="fast"),  # while fast was switched off
            exposure(6, "beside", shadow=True),
            exposure(7, version="v2"),
            exposure(8, experiment="other"),
        ]
    )
    assert await store.assigned("steps", "v1") == {"control": 2, "fast": 2}
    totals = await store.totals("steps", "v1")
    assert set(totals) == {"control", "fast", "beside"}
    control = totals["control"]
    assert (control.units, control.exposures, control.errors, control.engine_s) == (2, 3, 1, 1.0)
    assert sorted(control.seconds) == [1.0, 3.0]
    assert (totals["fast"].units, totals["fast"].exposures) == (1, 1)
    assert await store.earlier("steps", "v1") == 1
    assert await store.totals("none", "v1") == {}


async def test_an_exposure_said_twice_is_one(store: ExperimentStore):
    both = [exposure(1), exposure(1, experiment="other", version="v9")]
    await store.record(both)
    await asyncio.gather(*(store.record([*both, exposure(2)]) for _ in range(4)))
    assert (await store.totals("steps", "v1"))["control"].exposures == 2
    assert (await store.totals("other", "v9"))["control"].exposures == 1


async def test_a_unit_counts_once_by_the_share_of_its_pictures(store: ExperimentStore):
    await store.record([exposure(n, unit="ada" if n < 4 else f"unit-{n}") for n in range(6)])
    await store.record([exposure(6, error="engine_fault")])
    for n in (0, 1, 2, 4):
        await store.say("ada", f"{n:032x}", "kept", 1.0)
    sums = await store.sums("steps", "v1", "kept")
    assert sums == {"control": Sums(units=3, total=0.75 + 1.0, squares=0.75**2 + 1.0)}  # ada 3 of 4, one kept, one not
    assert (await store.sums("steps", "v1", "rejected"))["control"].total == 0.0


async def test_ratings_are_those_of_who_rated(store: ExperimentStore):
    await store.record([exposure(n, "fast") for n in range(4)])
    await store.say("ada", f"{0:032x}", "rating", 5.0)
    await store.say("ada", f"{1:032x}", "rating", 2.0)
    assert await store.sums("steps", "v1", "rating") == {"fast": Sums(units=2, total=1.25, squares=1.0 + 0.25**2)}


async def test_the_last_word_on_an_outcome_counts(store: ExperimentStore):
    await store.record([exposure(1), exposure(1, experiment="other", arm="b")])
    for value in (2.0, 4.0, 4.0):
        arms = await store.say("ada", f"{1:032x}", "rating", value)
        assert arms == {"steps": "control", "other": "b"}
    await store.say("ada", f"{1 + 10**6:032x}", "kept", 1.0)  # by its receipt
    assert (await store.sums("steps", "v1", "rating"))["control"].total == 0.75
    assert (await store.sums("other", "v1", "kept"))["b"].total == 1.0


async def test_one_outcome_said_by_many_at_once_is_one(store: ExperimentStore):
    await store.record([exposure(1)])
    await asyncio.gather(*(store.say("ada", f"{1:032x}", "favourite", 1.0) for _ in range(6)))
    assert (await store.sums("steps", "v1", "favourite"))["control"].total == 1.0


async def test_nobody_says_anything_of_anothers_nor_of_what_was_not_drawn_or_not_shown(store: ExperimentStore):
    await store.record([exposure(1), exposure(2, error="overloaded"), exposure(3, "beside", shadow=True)])
    for owner, n in (("bob", 1), ("ada", 2), ("ada", 3), ("ada", 9)):
        with pytest.raises(NotFound):
            await store.say(owner, f"{n:032x}", "kept", 1.0)


async def test_what_is_forgotten_is_gone_with_its_outcomes(store: ExperimentStore):
    await store.record([exposure(1), exposure(2), exposure(2, experiment="other")])
    for n in (1, 2):
        await store.say("ada", f"{n:032x}", "kept", 1.0)
    assert await store.forget("steps") == 2
    assert await store.totals("steps", "v1") == {}
    assert (await store.sums("other", "v1", "kept"))["control"].total == 1.0
    assert await store.forget("steps") == 0


@pytest.mark.parametrize(
    ("outcome", "value", "field"),
    [("liked", None, "outcome"), ("rating", None, "value"), ("rating", 5.1, "value"), ("kept", 1.0, "value")],
)
def test_an_outcome_that_cannot_be_is_refused(outcome: str, value: float | None, field: str):
    with pytest.raises(InvalidRequest) as refused:
        check_outcome(outcome, value)
    assert refused.value.field == field


async def test_of_generations_with_one_receipt_the_newest_is_meant(store: ExperimentStore):
    """Pictures out of the cache have the receipt of those that were drawn."""
    receipt = f"{99:032x}"
    await store.record([exposure(1, receipt_id=receipt)])
    await asyncio.sleep(0.01)
    await store.record([exposure(2, "fast", receipt_id=receipt)])
    assert await store.say("ada", receipt, "kept", 1.0) == {"steps": "fast"}
    assert await store.say("ada", f"{1:032x}", "kept", 1.0) == {"steps": "control"}
