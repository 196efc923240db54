"""Exposures and outcomes in the database: written down, found again, and added up."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, cast, get_args

from sqlalchemy import ColumnElement, and_, delete, distinct, func, insert, literal_column, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, clock, one_at_a_time
from app.experiments.tables import exposures, outcomes
from models.errors import InvalidRequest, NotFound

OutcomeKind = Literal["kept", "favourite", "rejected", "rating"]
OUTCOMES: tuple[OutcomeKind, ...] = get_args(OutcomeKind)
RATINGS = (1.0, 5.0)
LATENCIES = 10_000  # of an arm, the newest, by which quantiles are told

_AS_ASSIGNED = exposures.c.arm == exposures.c.assigned
_OPEN = exposures.c.shadow.is_(False)
_DRAWN = exposures.c.error.is_(None)


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """What a request drew for an arm, or the code of the error that kept it from that.

    `total_s` is how long it took, None where nothing was drawn (found in the cache, or failed); `engine_s` the seconds
    that its pictures spent in the engine, added up.
    """

    id: str
    experiment: str
    arm: str
    assigned: str
    version: str
    unit: str
    shadow: bool
    owner: str
    model: str
    receipt_id: str | None = None
    total_s: float | None = None
    engine_s: float = 0.0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What is known of one arm. `units` were exposed to it, `exposures` in all, `errors` of them without a picture."""

    units: int
    exposures: int
    errors: int
    engine_s: float  # of one exposure that drew, on average
    seconds: tuple[float, ...] = ()  # that drawings took, the newest first


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Of a number between 0 and 1 for each of `units` units: their sum, and that of their squares."""

    units: int
    total: float
    squares: float


def check_outcome(outcome: str, value: float | None) -> tuple[OutcomeKind, float]:
    """The outcome and its value, 1 but for a rating. Raises InvalidRequest naming `outcome` or `value`."""
    if outcome not in OUTCOMES:
        raise InvalidRequest("outcome", f"must be one of {', '.join(OUTCOMES)}, not {outcome[:40]!r}")
    low, high = RATINGS
    if outcome == "rating" and (value is None or not low <= value <= high):
        raise InvalidRequest("value", f"of a rating must be between {low:g} and {high:g}")
    if outcome != "rating" and value is not None:
        raise InvalidRequest("value", f"is for ratings; {outcome} has none")
    return cast(OutcomeKind, outcome), 1.0 if value is None else value


class ExperimentStore:
    """What experiments have come to, in one database. Every method raises Unavailable where that does not answer."""

    def __init__(self, database: Database):
        self._database = database

    async def record(self, seen: Sequence[Exposure]) -> None:
        """Writes exposures down. Those that are there already, by an earlier try, stay as they are."""

        async def work(connection: AsyncConnection) -> None:
            await one_at_a_time(connection, "exposures")
            now, ids = await clock(connection), {one.id for one in seen}
            known = await connection.execute(
                select(exposures.c.id, exposures.c.experiment).where(exposures.c.id.in_(ids))
            )
            there = {(row.id, row.experiment) for row in known}
            fresh = [asdict(one) | {"created_at": now} for one in seen if (one.id, one.experiment) not in there]
            if fresh:
                await connection.execute(insert(exposures), fresh)

        await self._database.write(work)

    async def say(self, owner: str, id: str, outcome: OutcomeKind, value: float) -> Mapping[str, str]:
        """Notes what became of a generation, by its id or its receipt's; the last word on an outcome counts.

        Gives the arm by experiment. Raises NotFound for what is not of that owner, or in no experiment.
        """

        async def work(connection: AsyncConnection) -> Mapping[str, str]:
            mine = and_(exposures.c.owner == owner, _OPEN, _DRAWN)
            about = or_(exposures.c.id == id, exposures.c.receipt_id == id)
            found = await connection.execute(
                select(exposures).where(mine, about).order_by(exposures.c.created_at.desc())
            )
            rows = found.all()
            if not rows:
                raise NotFound(f"nothing of the id {id[:64]!r} was drawn in an experiment for this caller")
            # Of generations that were given out again by one receipt, the newest is meant.
            meant = id if any(row.id == id for row in rows) else rows[0].id
            await one_at_a_time(connection, f"outcome {meant}")
            key = and_(outcomes.c.id == meant, outcomes.c.outcome == outcome)
            changed = await connection.execute(update(outcomes).where(key).values(value=value).returning(outcomes.c.id))
            if changed.first() is None:
                values = {"id": meant, "outcome": outcome, "value": value, "created_at": await clock(connection)}
                await connection.execute(insert(outcomes).values(values))
            return {row.experiment: row.arm for row in rows if row.id == meant}

        return await self._database.write(work)

    async def assigned(self, experiment: str, version: str) -> Mapping[str, int]:
        """How many units each arm was assigned, whichever drew."""
        query = select(exposures.c.assigned, func.count(distinct(exposures.c.unit)))
        query = query.where(_of(experiment, version), _OPEN).group_by(exposures.c.assigned)

        async def work(connection: AsyncConnection) -> Mapping[str, int]:
            return {row[0]: int(row[1]) for row in (await connection.execute(query)).all()}

        return await self._database.read(work)

    async def totals(self, experiment: str, version: str) -> Mapping[str, Totals]:
        """By arm, shadows too; of a unit whose arm was switched off nothing is counted meanwhile."""
        counts = select(
            exposures.c.arm,
            func.count(distinct(exposures.c.unit)).label("units"),
            func.count().label("exposures"),
            func.count(exposures.c.error).label("errors"),
            func.avg(exposures.c.engine_s).filter(_DRAWN).label("engine_s"),
        ).where(_of(experiment, version), _AS_ASSIGNED)

        async def work(connection: AsyncConnection) -> Mapping[str, Totals]:
            found = {}
            for row in (await connection.execute(counts.group_by(exposures.c.arm))).all():
                this = and_(_of(experiment, version), _AS_ASSIGNED, exposures.c.arm == row.arm)
                timed = select(exposures.c.total_s).where(this, exposures.c.total_s.is_not(None))
                newest = timed.order_by(exposures.c.created_at.desc()).limit(LATENCIES)
                found[row.arm] = Totals(
                    units=int(row.units),
                    exposures=int(row.exposures),
                    errors=int(row.errors),
                    engine_s=float(row.engine_s or 0.0),
                    seconds=tuple((await connection.scalars(newest)).all()),
                )
            return found

        return await self._database.read(work)

    async def sums(self, experiment: str, version: str, outcome: OutcomeKind) -> Mapping[str, Sums]:
        """By arm: of each unit, the share of its pictures with that outcome, or its mean rating as a share of the
        range. A unit counts once, however much it draws: what is assigned at random are units."""
        low, high = RATINGS
        value = func.coalesce(outcomes.c.value, 0.0)
        if outcome == "rating":
            value = (outcomes.c.value - low) / (high - low)
        said = and_(outcomes.c.id == exposures.c.id, outcomes.c.outcome == outcome)
        joined = exposures.join(outcomes, said, isouter=outcome != "rating")
        units = (
            select(exposures.c.arm, func.avg(value).label("mean"))
            .select_from(joined)
            .where(_of(experiment, version), _AS_ASSIGNED, _OPEN, _DRAWN)
            .group_by(exposures.c.arm, exposures.c.unit)
            .subquery()
        )
        query = select(units.c.arm, func.count(), func.sum(units.c.mean), func.sum(units.c.mean * units.c.mean))

        async def work(connection: AsyncConnection) -> Mapping[str, Sums]:
            rows = (await connection.execute(query.group_by(units.c.arm))).all()
            return {a: Sums(units=int(n), total=float(s), squares=float(q)) for a, n, s, q in rows}

        return await self._database.read(work)

    async def earlier(self, experiment: str, version: str) -> int:
        """How many exposures there are by other rules of assignment."""
        query = select(func.count()).where(exposures.c.experiment == experiment, exposures.c.version != version)
        return int(await self._database.read(lambda connection: connection.scalar(query)) or 0)

    async def forget(self, experiment: str) -> int:
        """Removes all exposures of an experiment, and the outcomes that are of no other; tells how many there were."""

        async def work(connection: AsyncConnection) -> int:
            gone = await connection.execute(delete(exposures).where(exposures.c.experiment == experiment))
            left = select(literal_column("1")).where(exposures.c.id == outcomes.c.id)
            await connection.execute(delete(outcomes).where(~left.exists()))
            return gone.rowcount

        return await self._database.write(work)


def _of(experiment: str, version: str) -> ColumnElement[bool]:
    return and_(exposures.c.experiment == experiment, exposures.c.version == version)
