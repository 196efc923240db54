"""What the arms' numbers say: intervals for a difference, one of them good at any look, and a check of the assignment.

scipy does the distributions; it is imported where it is used, so that a gateway which is asked for no report is no
larger for it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.experiments.store import Sums

CONFIDENCE = 0.95
LEAST_UNITS = 30  # in each arm, before the interval of one look is told: it rests on the central limit theorem
MISMATCH_P = 0.001  # below it the assignment is not to be believed
LEAST_EXPECTED = 5  # units in each arm, before that is asked: with fewer chi-square calls chance a fault

_HALVINGS = 50  # of an interval within (-1, 1): to the precision that numbers near 1 have
_POINTS, _ROUNDS = 65, 7  # looks at an interval for where it ends: to 2 / 64^7, each over an array

Numbers = Any  # a float or an array of them


@dataclass(frozen=True)
class Interval:
    """Where a number lies, with a confidence."""

    low: float
    high: float

    def scaled(self, by: float) -> "Interval":
        """The same in another unit."""
        return Interval(self.low * by, self.high * by)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An arm's mean less the control's. `once` is for one look at a time that was chosen before, None for too few
    units; `always` and `p_value` hold however often one looks, and whenever one stops."""

    estimate: float
    once: Interval | None
    always: Interval
    p_value: float

    def scaled(self, by: float) -> "Difference":
        """The same in another unit."""
        once = None if self.once is None else self.once.scaled(by)
        return Difference(estimate=self.estimate * by, once=once, always=self.always.scaled(by), p_value=self.p_value)


def difference(control: Sums, arm: Sums, confidence: float = CONFIDENCE) -> Difference:
    """Compares two arms by a number between 0 and 1 of each of their units; each has one unit at least."""
    (a, s), (b, t) = (control.units, control.total), (arm.units, arm.total)
    estimate = t / b - s / a
    threshold = -math.log(1 - confidence)

    def is_in(delta: Numbers) -> Numbers:
        return evidence(a, s, b, t, delta) < threshold

    low, high = (_edge(is_in, estimate, outside) for outside in (-1.0, 1.0))
    p_value = min(1.0, math.exp(-float(evidence(a, s, b, t, 0.0))))
    once = welch(control, arm, confidence)
    return Difference(estimate=estimate, once=once, always=Interval(low, high), p_value=p_value)


def evidence(a: Numbers, s: Numbers, b: Numbers, t: Numbers, delta: Numbers) -> Numbers:
    """The logarithm of an e-value against the means of two arms being `delta` apart; vectorised.

    `a` independent numbers within [0, 1] add up to s, and b others to t. For each arm, the likelihood ratio of a
    uniform mixture of means to one mean is a test supermartingale against that mean (Robbins, 1970; for any numbers
    within [0, 1]: Howard, Ramdas, McAuliffe and Sekhon, 2021, arXiv:1810.08240). So is the product of both against a
    pair of means, and the least over all pairs that are `delta` apart never exceeds that of the true pair. By Ville's
    inequality it ever reaches -log(0.05) with a probability of at most 0.05 where `delta` is true.
    """
    from scipy.special import betaln, xlog1py, xlogy

    a, s, b, t, delta = np.broadcast_arrays(*(np.asarray(x, float) for x in (a, s, b, t, delta)))
    p = _likeliest(a, s, b, t, delta)
    q = np.clip(p + delta, 0.0, 1.0)
    mixtures = betaln(1 + s, 1 + a - s) + betaln(1 + t, 1 + b - t)
    with np.errstate(divide="ignore"):  # where a mean of 0 or 1 is impossible, the evidence against it is infinite
        return mixtures - (xlogy(s, p) + xlog1py(a - s, -p) + xlogy(t, q) + xlog1py(b - t, -q))


def mismatch(units: Sequence[int], weights: Sequence[float]) -> float:
    """How likely so uneven an assignment is (chi-square): below MISMATCH_P something keeps units from an arm.

    1 as long as an arm should have less than LEAST_EXPECTED units.
    """
    from scipy.stats import chisquare

    total, weight = sum(units), sum(weights)
    expected = [total * w / weight for w in weights]
    if len(units) < 2 or min(expected) < LEAST_EXPECTED:
        return 1.0
    return float(chisquare(units, expected).pvalue)


def quantiles(seconds: Sequence[float], at: Sequence[float]) -> list[float | None]:
    """Of what took so long; None where nothing did."""
    return [float(x) for x in np.quantile(seconds, at)] if seconds else [None for _ in at]


def welch(control: Sums, arm: Sums, confidence: float = CONFIDENCE) -> Interval | None:
    """Welch's interval for the difference of two means, of arms of any variance; None for too few units."""
    if min(control.units, arm.units) < LEAST_UNITS:
        return None
    from scipy.stats import t

    means, errors = [one.total / one.units for one in (control, arm)], [_squared_error(o) for o in (control, arm)]
    squared = sum(errors)
    if not squared:
        return None
    freedom = squared**2 / sum(e**2 / (o.units - 1) for e, o in zip(errors, (control, arm), strict=True))
    low, high = t.interval(confidence, freedom, loc=means[1] - means[0], scale=math.sqrt(squared))
    return Interval(float(low), float(high))


def _squared_error(sums: Sums) -> float:
    """Of the mean."""
    mean = sums.total / sums.units
    return max(0.0, sums.squares / sums.units - mean**2) / (sums.units - 1)


def _likeliest(a: Numbers, s: Numbers, b: Numbers, t: Numbers, delta: Numbers) -> Numbers:
    """The control's mean that is likeliest where the other one is `delta` above it: where the slope of the likelihood's
    logarithm, which falls, is 0."""

    def rises(p: Numbers) -> Numbers:
        with np.errstate(divide="ignore", invalid="ignore"):
            up = np.where(s > 0, s / p, 0.0) + np.where(t > 0, t / (p + delta), 0.0)
            down = np.where(a > s, (a - s) / (1 - p), 0.0) + np.where(b > t, (b - t) / (1 - p - delta), 0.0)
            return up > down

    low, high = np.maximum(0.0, -delta), np.minimum(1.0, 1.0 - delta)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        upwards = rises(middle)
        low, high = np.where(upwards, middle, low), np.where(upwards, high, middle)
    return (low + high) / 2


def _edge(is_in: Callable[[Numbers], Numbers], inside: float, outside: float) -> float:
    """Where an interval ends between a number that is in it and one that may not be."""
    for _ in range(_ROUNDS):
        line = np.linspace(inside, outside, _POINTS)
        out = np.flatnonzero(~is_in(line))
        first = int(out[0]) if len(out) else _POINTS - 1
        inside, outside = float(line[max(first - 1, 0)]), float(line[first])
    return outside
