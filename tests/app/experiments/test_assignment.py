"""Who has which arm: sticky, as the weights say, independent, and moved only as far as must be."""

from collections import Counter

import pytest
from scipy.stats import chi2_contingency, chisquare

from app.experiments.assignment import arm_of, is_in, pseudonym, uniform

USERS = [f"caller/{n}" for n in range(10_000)]
EVEN = {"control": 1.0, "fast": 1.0}


def arms(salt: str, weights: dict[str, float]) -> list[str]:
    return [arm_of(salt, user, weights) for user in USERS]


def test_it_is_the_same_every_time_and_everywhere():
    assert [arm_of("a", user, EVEN) for user in USERS[:8]] == [
        arm_of("a", user, dict(reversed(EVEN.items()))) for user in USERS[:8]
    ]
    # Written down once: another version, process or machine must not draw anew who is where.
    assert [arm_of("a", f"caller/{n}", EVEN) for n in range(8)] == [
        *("control", "control", "fast", "fast", "fast", "fast", "fast", "control")
    ]


@pytest.mark.parametrize("weights", [EVEN, {"a": 9.0, "b": 1.0}, {"a": 0.2, "b": 0.3, "c": 0.5}], ids=str)
@pytest.mark.parametrize("salt", ["bigger-model", "fewer-steps"])
def test_arms_have_their_shares(salt: str, weights: dict[str, float]):
    counts, whole = Counter(arms(salt, weights)), sum(weights.values())
    expected = [len(USERS) * weight / whole for weight in weights.values()]
    assert chisquare([counts[arm] for arm in weights], expected).pvalue > 0.001


def test_experiments_are_independent_of_each_other():
    pairs = Counter(zip(arms("one", EVEN), arms("other", EVEN), strict=True))
    table = [[pairs[first, second] for second in EVEN] for first in EVEN]
    assert chi2_contingency(table).pvalue > 0.001


def test_arms_are_independent_of_who_is_in():
    inside = [user for user in USERS if is_in("one", user, 0.3)]
    counts = Counter(arm_of("one", user, EVEN) for user in inside)
    assert chisquare([counts[arm] for arm in EVEN]).pvalue > 0.001


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_a_share_is_a_share_and_grows(share: float):
    inside = {user for user in USERS if is_in("one", user, share)}
    assert abs(len(inside) - share * len(USERS)) < 4 * (share * (1 - share) * len(USERS)) ** 0.5 + 1
    assert inside <= {user for user in USERS if is_in("one", user, min(1.0, 2 * share))}


def test_a_weight_that_grows_draws_units_from_the_others_and_moves_no_one_else():
    before = arms("one", {"a": 1.0, "b": 1.0, "c": 1.0})
    after = arms("one", {"a": 2.0, "b": 1.0, "c": 1.0})
    moved = Counter((old, new) for old, new in zip(before, after, strict=True) if old != new)
    assert set(moved) == {("b", "a"), ("c", "a")}
    assert moved.total() / len(USERS) == pytest.approx(2 / 4 - 1 / 3, abs=0.015)  # what a's share grows by, no more


def test_a_weight_that_shrinks_gives_units_to_the_others_and_moves_no_one_else():
    before = arms("one", {"a": 2.0, "b": 1.0})
    after = arms("one", {"a": 1.0, "b": 1.0})
    moved = Counter((old, new) for old, new in zip(before, after, strict=True) if old != new)
    assert set(moved) == {("a", "b")}


def test_an_arm_that_is_added_takes_its_share_and_moves_no_one_else():
    before, after = arms("one", EVEN), arms("one", EVEN | {"new": 1.0})
    assert {new for old, new in zip(before, after, strict=True) if old != new} == {"new"}


def test_numbers_are_spread_evenly():
    tenths = Counter(int(10 * uniform("salt", user)) for user in USERS)
    assert chisquare([tenths[n] for n in range(10)]).pvalue > 0.001


def test_a_pseudonym_says_nothing_outside_its_experiment():
    assert pseudonym("one", "ada") == pseudonym("one", "ada") != pseudonym("other", "ada")
    assert len(pseudonym("one", "ada")) == 32
    assert "ada" not in pseudonym("one", "ada")
