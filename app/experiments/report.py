"""The report of one experiment: what each arm came to, how it differs from the control, and whether to believe it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from app.experiments import statistics
from app.experiments.experiments import Offered
from app.experiments.rails import RailState
from app.experiments.statistics import Difference, difference
from app.experiments.store import OUTCOMES, RATINGS, ExperimentStore, OutcomeKind, Sums, Totals

_NOTHING = Totals(units=0, exposures=0, errors=0, engine_s=0.0)


@dataclass(frozen=True, kw_only=True)
class OutcomeReport:
    """An outcome of one arm: of how many units, the mean of their shares (or of their ratings), against the control."""

    units: int
    mean: float
    difference: Difference | None  # none of the control, nor where one of the two has no unit


@dataclass(frozen=True, kw_only=True)
class ArmReport:
    """One arm. `assigned` units belong to it, `units` were exposed to it, so many times, `errors` of them in vain."""

    name: str
    weight: float
    shadow: bool
    rail: RailState
    assigned: int
    units: int
    exposures: int
    errors: int
    p50_s: float | None
    p95_s: float | None
    engine_s: float
    outcomes: Mapping[OutcomeKind, OutcomeReport]


@dataclass(frozen=True, kw_only=True)
class Report:
    """An experiment as it stands. `mismatch_p` is how likely so uneven an assignment is, `earlier` how many exposures
    by other rules are left out."""

    name: str
    version: str
    control: str
    confidence: float
    mismatch_p: float
    earlier: int
    arms: tuple[ArmReport, ...]

    @property
    def mismatched(self) -> bool:
        """Whether something keeps units from an arm, so that the rest is not to be believed."""
        return self.mismatch_p < statistics.MISMATCH_P


async def report(store: ExperimentStore, offered: Offered) -> Report:
    """Reads it all from the database. Raises Unavailable."""
    name, settings = offered.name, offered.settings
    assigned, totals = await store.assigned(name, settings.version), await store.totals(name, settings.version)
    sums: dict[OutcomeKind, Mapping[str, Sums]] = {}
    for outcome in OUTCOMES:
        sums[outcome] = await store.sums(name, settings.version, outcome)

    def compared() -> tuple[ArmReport, ...]:
        return tuple(
            _arm(offered, arm, assigned.get(arm, 0), totals.get(arm, _NOTHING), _outcomes(sums, arm, settings.control))
            for arm in settings.arms
        )

    drawn = settings.drawn
    return Report(
        name=name,
        version=settings.version,
        control=settings.control,
        confidence=statistics.CONFIDENCE,
        mismatch_p=statistics.mismatch([assigned.get(arm, 0) for arm in drawn], [a.weight for a in drawn.values()]),
        earlier=await store.earlier(name, settings.version),
        arms=await asyncio.to_thread(compared),  # some tens of milliseconds for each difference
    )


def _arm(
    offered: Offered, name: str, assigned: int, totals: Totals, outcomes: Mapping[OutcomeKind, OutcomeReport]
) -> ArmReport:
    settings = offered.settings.arms[name]
    p50_s, p95_s = statistics.quantiles(totals.seconds, (0.5, 0.95))
    return ArmReport(
        name=name,
        weight=settings.weight,
        shadow=settings.shadow,
        rail=offered.rails.get(name, RailState()),
        assigned=assigned,
        units=totals.units,
        exposures=totals.exposures,
        errors=totals.errors,
        p50_s=p50_s,
        p95_s=p95_s,
        engine_s=totals.engine_s,
        outcomes=outcomes,
    )


def _outcomes(
    sums: Mapping[OutcomeKind, Mapping[str, Sums]], arm: str, control: str
) -> Mapping[OutcomeKind, OutcomeReport]:
    """Those that any unit of the arm has said; a difference in ratings is one in stars."""
    found = {}
    for outcome, by_arm in sums.items():
        mine, other = by_arm.get(arm), by_arm.get(control)
        if mine is None:
            continue
        compared = difference(other, mine) if other is not None and arm != control else None
        low, high = RATINGS if outcome == "rating" else (0.0, 1.0)
        found[outcome] = OutcomeReport(
            units=mine.units,
            mean=low + (high - low) * mine.total / mine.units,
            difference=None if compared is None else compared.scaled(high - low),
        )
    return found
