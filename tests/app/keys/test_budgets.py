"""What callers may have in a minute and at a time."""

import asyncio

import pytest

from app.errors import BudgetSpent
from app.keys.budgets import Budgets
from app.keys.caller import ANONYMOUS, Caller, Limits
from models.errors import InvalidRequest


def caller(id: str = "a", **limits: int) -> Caller:
    return Caller(id=id, name=id, scopes=frozenset(), limits=Limits(**limits))


def set_clock(budgets: Budgets, seconds: float) -> None:
    """Every minute under way ends as if the clock had been set forward by so much, or back."""
    ends = budgets._counts.expirations
    ends.update({name: at - seconds for name, at in ends.items()})


async def test_a_minute_holds_as_many_requests_as_the_limit_says():
    budgets, asking = Budgets(), caller(requests_per_minute=3)
    left = [await budgets.charge(asking, "requests_per_minute") for _ in range(3)]
    assert [allowance and allowance.remaining for allowance in left] == [2, 1, 0]
    with pytest.raises(BudgetSpent) as spent:
        await budgets.charge(asking, "requests_per_minute")
    error = spent.value
    assert (error.field, error.limit, error.remaining) == ("requests_per_minute", 3, 0)
    assert 55 < error.retry_after_s <= 60
    await budgets.charge(caller("b", requests_per_minute=3), "requests_per_minute")


async def test_what_does_not_fit_is_not_charged():
    budgets, asking = Budgets(), caller(pixel_steps_per_minute=100)
    await budgets.charge(asking, "pixel_steps_per_minute", 60)
    with pytest.raises(BudgetSpent, match="of which 40 are left; this request needs 41"):
        await budgets.charge(asking, "pixel_steps_per_minute", 41)
    allowance = await budgets.charge(asking, "pixel_steps_per_minute", 40)
    assert allowance
    assert allowance.remaining == 0


async def test_what_would_never_fit_is_the_requests_mistake():
    with pytest.raises(InvalidRequest, match="is 100; this request alone needs 101") as refused:
        await Budgets().charge(caller(pixel_steps_per_minute=100), "pixel_steps_per_minute", 101)
    assert refused.value.field == "pixel_steps_per_minute"


async def test_many_at_once_get_no_more_than_there_is():
    budgets, asking = Budgets(), caller(requests_per_minute=10)
    charges = (budgets.charge(asking, "requests_per_minute") for _ in range(100))
    outcomes = await asyncio.gather(*charges, return_exceptions=True)
    assert sum(not isinstance(outcome, BudgetSpent) for outcome in outcomes) == 10


async def test_what_was_charged_for_nothing_is_given_back():
    budgets, asking = Budgets(), caller(pixel_steps_per_minute=100)
    await budgets.charge(asking, "pixel_steps_per_minute", 30)
    charged = await budgets.charge(asking, "pixel_steps_per_minute", 70)
    await budgets.give_back(asking, "pixel_steps_per_minute", 70, charged)
    allowance = await budgets.charge(asking, "pixel_steps_per_minute", 60)
    assert allowance
    assert allowance.remaining == 10
    await budgets.give_back(ANONYMOUS, "pixel_steps_per_minute", 60, None)


async def test_what_is_given_back_after_its_minute_is_not_added_to_the_next():
    budgets, asking = Budgets(), caller(pixel_steps_per_minute=100)
    charged = await budgets.charge(asking, "pixel_steps_per_minute", 70)
    set_clock(budgets, 61.0)
    await budgets.charge(asking, "pixel_steps_per_minute", 100)
    await budgets.give_back(asking, "pixel_steps_per_minute", 70, charged)
    with pytest.raises(BudgetSpent, match="of which 0 are left"):
        await budgets.charge(asking, "pixel_steps_per_minute")


async def test_a_clock_that_is_set_back_locks_nobody_out():
    budgets, asking = Budgets(), caller(requests_per_minute=1)
    await budgets.charge(asking, "requests_per_minute")
    set_clock(budgets, -3600.0)
    allowance = await budgets.charge(asking, "requests_per_minute")
    assert allowance
    assert 55 < allowance.reset_s <= 60
    with pytest.raises(BudgetSpent) as spent:
        await budgets.charge(asking, "requests_per_minute")
    assert 55 < spent.value.retry_after_s <= 60


async def test_who_has_no_limit_is_not_counted():
    budgets = Budgets()
    for field in ("requests_per_minute", "pixel_steps_per_minute"):
        assert await budgets.charge(ANONYMOUS, field, 10**12) is None


def test_a_slot_is_given_back_however_the_job_ends():
    budgets, asking = Budgets(), caller(concurrent_jobs=2)
    with budgets.slot(asking), budgets.slot(asking), budgets.slot(caller("b", concurrent_jobs=1)):
        with pytest.raises(BudgetSpent) as spent, budgets.slot(asking):
            pass
        assert (spent.value.field, spent.value.retry_after_s) == ("concurrent_jobs", 1.0)
    with pytest.raises(ZeroDivisionError), budgets.slot(asking):
        raise ZeroDivisionError
    with budgets.slot(asking), budgets.slot(asking):
        pass
    assert not budgets._running


@pytest.mark.parametrize("limit", [0, -1, 10**16])
def test_a_limit_is_a_positive_number(limit: int):
    with pytest.raises(InvalidRequest, match="between 1 and"):
        Limits(concurrent_jobs=limit).check()
