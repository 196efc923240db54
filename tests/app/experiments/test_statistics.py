"""The intervals cover the truth as often as they say, in simulated experiments; one of them at every look."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import betabinom, binom, ttest_ind

from app.experiments.statistics import Interval, difference, evidence, mismatch, quantiles, welch
from app.experiments.store import Sums

EXPERIMENTS = 400


def sums(values: np.ndarray) -> Sums:
    return Sums(units=len(values), total=float(values.sum()), squares=float((values**2).sum()))


def covers(interval: Interval | None, truth: float) -> bool:
    assert interval is not None
    return interval.low <= truth <= interval.high


def within(share: float, truth: float, n: int = EXPERIMENTS) -> bool:
    """Whether a share of n is as near to the truth as chance leaves it, but for one time in thousands."""
    return abs(share - truth) < 3.5 * math.sqrt(truth * (1 - truth) / n)


TRUTHS = [(0.5, 0.5), (0.1, 0.15), (0.3, 0.2)]


@pytest.mark.parametrize(("control", "arm"), TRUTHS, ids=str)
def test_the_interval_of_one_look_covers_the_truth_at_its_rate(control: float, arm: float):
    random = np.random.default_rng(1)
    found = [
        welch(sums(random.binomial(1, control, 400)), sums(random.binomial(1, arm, 300))) for _ in range(EXPERIMENTS)
    ]
    assert within(np.mean([covers(one, arm - control) for one in found]), 0.95)


@pytest.mark.parametrize(("control", "arm"), [*TRUTHS, (0.01, 0.01)], ids=str)
def test_the_interval_of_any_look_covers_the_truth_at_every_observation(control: float, arm: float):
    """Two thousand looks at each of 400 experiments: one that leaves the truth out once has failed."""
    random = np.random.default_rng(2)
    looks = np.arange(1, 2001)
    s, t = (random.binomial(1, p, (EXPERIMENTS, len(looks))).cumsum(1) for p in (control, arm))
    out = evidence(looks, s, looks, t, arm - control) >= -math.log(0.05)
    assert out.any(1).mean() <= 0.05


def test_looking_often_at_the_interval_of_one_look_is_what_one_must_not_do():
    """The test above can fail: with Welch's interval every fourth experiment without any effect shows one."""
    random = np.random.default_rng(2)
    looks = np.arange(30, 2001)
    a, b = (random.binomial(1, 0.5, (EXPERIMENTS, 2000)).cumsum(1)[:, 29:] / looks for _ in range(2))
    error = np.sqrt((a * (1 - a) + b * (1 - b)) / (looks - 1))
    assert (np.abs(a - b) > 1.96 * error).any(1).mean() > 0.25


def test_uneven_arms_and_shares_of_pictures_are_covered_too():
    """Units whose numbers are shares, one arm with a third of the units, looked at as they come."""
    random = np.random.default_rng(3)
    to_control = random.random((EXPERIMENTS, 1500)) < 2 / 3
    values = (
        np.where(to_control, random.binomial(4, 0.3, to_control.shape), random.binomial(4, 0.4, to_control.shape)) / 4
    )
    a, b = to_control.cumsum(1), (~to_control).cumsum(1)
    s, t = (values * to_control).cumsum(1), (values * ~to_control).cumsum(1)
    assert (evidence(a, s, b, t, 0.1) >= -math.log(0.05)).any(1).mean() <= 0.05


def test_units_that_draw_again_and_feedback_that_is_late_are_covered_too():
    """A unit comes at each look, and all that came before draw again: the numbers that are added up go on changing,
    which no martingale allows for. Of a third of the pictures one hears only ten looks later."""
    random, looks, delay = np.random.default_rng(7), 150, 10
    came = np.arange(looks)[None, :] >= np.arange(looks)[:, None]  # unit, look
    pictures = np.maximum(came.cumsum(1), 1)
    out = []
    for _ in range(EXPERIMENTS // 4):
        shares = []
        for _ in range(2):
            kept = (random.random(came.shape) < random.beta(1, 2, looks)[:, None]) & came
            late = kept & (random.random(came.shape) < 1 / 3)
            heard = (kept & ~late).cumsum(1)
            heard[:, delay:] += late.cumsum(1)[:, :-delay]
            shares.append((heard / pictures * came).sum(0))
        out.append((evidence(came.sum(0), shares[0], came.sum(0), shares[1], 0.0) >= -math.log(0.05)).any())
    assert np.mean(out) <= 0.05


def test_a_difference_is_found():
    random = np.random.default_rng(4)
    found = [difference(sums(random.binomial(1, 0.3, 2000)), sums(random.binomial(1, 0.4, 2000))) for _ in range(20)]
    assert np.mean([one.always.low > 0 for one in found]) > 0.95
    assert np.mean([one.p_value < 0.05 for one in found]) > 0.95


def test_the_ends_are_where_the_evidence_reaches_the_threshold():
    one = difference(Sums(units=200, total=60, squares=60), Sums(units=150, total=80, squares=80))
    for end in (one.always.low, one.always.high):
        assert evidence(200, 60, 150, 80, end) == pytest.approx(-math.log(0.05), abs=1e-6)
    assert one.p_value == pytest.approx(math.exp(-evidence(200, 60, 150, 80, 0.0)))
    assert one.p_value < 0.05
    assert one.always.low > 0


def test_the_evidence_is_the_likelihood_ratio_of_scipys_distributions():
    """A beta-binomial against a binomial for each arm, at the pair of means that suits the data best."""
    p = np.linspace(1e-6, 0.9 - 1e-6, 200_001)
    ratio = betabinom.logpmf(30, 100, 1, 1) - binom.logpmf(30, 100, p)
    other = betabinom.logpmf(45, 80, 1, 1) - binom.logpmf(45, 80, p + 0.1)
    assert evidence(100, 30, 80, 45, 0.1) == pytest.approx((ratio + other).min(), abs=1e-6)


def test_the_interval_of_one_look_is_scipys():
    random = np.random.default_rng(5)
    a, b = random.random(50), random.random(70)
    found = difference(sums(a), sums(b)).once
    expected = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def edge_cases() -> Iterator[tuple[Sums, Sums]]:
    for total in (0.0, 1.0):
        for other in (0.0, 1.0):
            for units in (1, 1000):
                yield (
                    Sums(units=1, total=total, squares=total),
                    Sums(units=units, total=other * units, squares=other * units),
                )


@pytest.mark.parametrize(("control", "arm"), list(edge_cases()), ids=str)
def test_few_units_and_none_that_differ_are_no_trouble(control: Sums, arm: Sums):
    found = difference(control, arm)
    assert -1 <= found.always.low <= found.estimate <= found.always.high <= 1
    assert found.once is None
    assert 0 < found.p_value <= 1


def test_an_uneven_assignment_is_seen():
    assert mismatch([5050, 4950], [1, 1]) > 0.1
    assert mismatch([5300, 4700], [1, 1]) < 0.001
    assert mismatch([9010, 990], [9, 1]) > 0.1
    assert mismatch([0, 0], [1, 1]) == 1.0
    assert mismatch([7], [1]) == 1.0


def test_a_few_units_are_no_mismatch():
    """One unit of twenty is in the small arm; that it comes first says nothing."""
    assert mismatch([0, 1], [95, 5]) == 1.0
    random = np.random.default_rng(6)
    found = [mismatch([n - s, s], [95, 5]) for n in (2, 10, 100, 200) for s in map(int, random.binomial(n, 0.05, 1000))]
    assert np.mean(np.array(found) < 0.001) < 0.003
    assert mismatch([990, 10], [95, 5]) < 0.001


def test_quantiles():
    assert quantiles([1.0, 2.0, 3.0], (0.5,)) == [2.0]
    assert quantiles([], (0.5, 0.95)) == [None, None]
