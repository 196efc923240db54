"""Open loop on one model: what the best baseline and the engine stand of arrivals that wait for nobody."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from bench.arrivals import poisson
from bench.budget import Budget, Portion
from bench.built import Built
from bench.contender import Contender
from bench.load import Run, Say, driven
from bench.openloop import PATIENCE, searched
from bench.pages import Keep, Piece
from bench.replay import FIFO, BatchCosts, Trace
from bench.report import NOTHING, Sheet, figure
from bench.results import Capacity, OpenLoop, ratio
from bench.static import padded_size
from bench.turns import saturated
from bench.workloads import Workload, class_of, requests_of
from models.request import GenerationRequest

FLOOR_S = 1.0  # nobody has to be faster than that
GUESS = 0.7  # of the engine's saturated throughput: where the search for its capacity begins
HIGHEST = 2.0  # times what groups would give if they cost no more than one: no baseline is looked for above it
COMMON = 0.8  # of B1c's capacity: the rate at which tails are compared
SEARCH, TAIL = 4, 1  # portions of the minutes
LEGEND = (
    f"Capacity: Poisson arrivals a second of which 95 % are finished within {PATIENCE:g} times what B0 takes for such "
    f"a request alone, {FLOOR_S:g} s at least. Computed: by a replay of measured batch times, groups with the best of "
    "their largest sizes; measured: found by trials, for the better of the two and for E. p99, seconds, at "
    f"{COMMON:.0%} of the groups' capacity. All have the same requests, arrivals and deadlines. *: time ended the "
    "search, and more may pass."
)


@dataclass(kw_only=True)
class Found:
    """One workload's findings; what was not measured stays None. Capacities are arrivals a second."""

    workload: str
    computed: dict[str, float]  # by baseline: one at a time, in groups
    group: int  # the largest, in pictures
    capacities: dict[str, Capacity] = field(default_factory=dict)  # measured, by contender
    tails: dict[str, OpenLoop] = field(default_factory=dict)  # at the common rate, by contender
    cut: list[str] = field(default_factory=list)

    @property
    def common(self) -> float:
        """The rate at which tails are compared."""
        grouped = list(self.computed)[1]
        known = self.capacities.get(grouped)
        return COMMON * (known.rate if known is not None and known.rate else self.computed[grouped])

    @property
    def best(self) -> str:
        """The better of the baselines."""
        return max(self.computed, key=lambda name: self.computed[name])


class Capacities:
    """Everyone's capacity under every workload, baselines first: tails are compared at a rate of theirs."""

    def __init__(self, built: Built, say: Say, keep: Keep):
        self._built = built
        self._options = built.options
        self._say = say
        self._keep = keep
        self._budget = Budget(built.options.minutes, 2 * (SEARCH + TAIL) * len(built.workloads))

    async def run(self) -> None:
        async with self._built.serial(self._built.group_sizes) as serial:
            self._say("the baselines' batch times", 0, 1)
            costs = await serial.batch_costs(self._built.sides, self._built.group_sizes)
        found = [self._computed(workload, costs) for workload in self._built.workloads]
        for workload, one in zip(self._built.workloads, found, strict=True):
            await self._baseline(workload, one)
            self._tell(found)
        async with self._built.shared() as engine:
            for workload, one in zip(self._built.workloads, found, strict=True):
                at_most = await self._saturated(engine, workload)
                await self._search(engine, workload, one, GUESS * at_most)
                await self._tail(engine, workload, one)
                self._tell(found)

    def _tell(self, found: list[Found]) -> None:
        notes = [f"{one.workload}: {what}." for one in found for what in [*_trials(one), *one.cut]]
        count = f"{self._options.requests} requests in a trial."
        figures = {"isolated_s": self._built.isolated_s, "workloads": found}
        self._keep(Piece.of("open", self._built, [_sheet(self._built, found)], [LEGEND, count, *notes], figures))

    def _computed(self, workload: Workload, costs: BatchCosts) -> Found:
        """The baselines' capacities by a replay, and the better of them."""
        trace, sizes = self._trace(workload), self._built.group_sizes
        alone_s = sum(costs.batch_s([request]) for request in trace.requests) / len(trace.requests)

        def capacity(latencies_s: Callable[[float], Sequence[float]]) -> float:
            return trace.capacity(latencies_s, HIGHEST * max(sizes) / alone_s)

        def grouped(most: int) -> float:
            room = [size for size in sizes if size <= most]

            def batch_s(batch: Sequence[GenerationRequest]) -> float:
                return costs.batch_s([batch[0]] * padded_size(len(batch), room))

            return capacity(lambda rate: trace.when_free_s(rate, most, batch_s))

        by_group = {most: grouped(most) for most in sizes[1:]}
        group = max(by_group, key=lambda most: by_group[most])
        one, many = self._built.baselines
        serial = capacity(lambda rate: trace.latencies_s(rate, FIFO, costs.batch_s))
        return Found(workload=workload.name, computed={one: serial, many: by_group[group]}, group=group)

    async def _baseline(self, workload: Workload, found: Found) -> None:
        serial = found.best == self._built.baselines[0]
        best = self._built.serial() if serial else self._built.grouped(found.group)
        async with best:
            await self._search(best, workload, found, found.computed[found.best])
        async with self._built.grouped(found.group) as grouped:
            await self._tail(grouped, workload, found)

    async def _saturated(self, engine: Contender, workload: Workload) -> float:
        """Pictures a second."""
        options = self._options
        requests = requests_of(workload, options.pictures, options.seed, self._built.network.name)
        found = await saturated(engine, self._built, workload, requests, self._say)
        return found.pictures_per_s

    async def _search(self, contender: Contender, workload: Workload, found: Found, guess: float) -> None:
        fits = partial(_fits, self._budget.take(SEARCH), self._trace(workload))

        async def trial(rate: float) -> Run:
            return await self._at(contender, workload, rate, give_up=True)

        capacity = await searched(trial, guess, self._options.refinements, fits=fits)
        found.capacities[contender.name] = capacity
        if capacity.cut:
            found.cut.append(f"{contender.name}'s search was cut, {capacity.note}")

    async def _tail(self, contender: Contender, workload: Workload, found: Found) -> None:
        if not found.common or not _fits(self._budget.take(TAIL), self._trace(workload), found.common):
            found.cut.append(f"{contender.name}'s tail at {found.common:.2f} a second was left out")
            return
        run = await self._at(contender, workload, found.common, give_up=False)
        found.tails[contender.name] = OpenLoop.of(found.common, run)

    async def _at(self, contender: Contender, workload: Workload, rate: float, give_up: bool) -> Run:
        what = f"{workload.title}: {rate:.2f} a second"
        return await driven(contender, self._trace(workload).load(rate, give_up), what, self._say)

    def _trace(self, workload: Workload) -> Trace:
        options = self._options
        requests = requests_of(workload, options.requests, options.seed + 1, self._built.network.name)
        limits_s = [max(FLOOR_S, PATIENCE * self._built.isolated_s[class_of(request)]) for request in requests]
        return Trace(requests=requests, arrivals=poisson(len(requests), options.seed), limits_s=limits_s)


def _fits(portion: Portion, trace: Trace, rate: float) -> bool:
    """Whether a trial that passes would be over in time."""
    return portion.has(trace.arrivals[-1] / rate + max(trace.limits_s))


def _trials(found: Found) -> list[str]:
    """Each search, and the share in time of each of its rates."""
    return [
        f"{name} by {', '.join(f'{trial.rate:.2f} ({trial.attainment:.0%})' for trial in capacity.trials)}"
        for name, capacity in found.capacities.items()
        if capacity.trials
    ]


def _sheet(built: Built, found: Sequence[Found]) -> Sheet:
    name, (one, many) = built.network.name, built.baselines
    return Sheet(
        title=f"{name} at {built.side} px, open loop",
        columns=(
            name,
            *(f"computed {one}", many, "group", "measured best", "E", "E / best"),
            *("at", f"p99 {many}", "E", f"E / {many}"),
        ),
        rows=[_row(each, many) for each in found],
    )


def _row(found: Found, many: str) -> list[str]:
    best, engine = found.capacities.get(found.best), found.capacities.get("E")
    tails = [found.tails[name].p99_s if name in found.tails else None for name in (many, "E")]
    return [
        found.workload,
        *(figure(rate) for rate in found.computed.values()),
        str(found.group),
        f"{found.best} {_told(best)}",
        _told(engine),
        figure(ratio(engine and engine.rate, best and best.rate)),
        figure(found.common),
        *map(figure, tails),
        figure(ratio(tails[1], tails[0])),
    ]


def _told(capacity: Capacity | None) -> str:
    if capacity is None or not capacity.trials:
        return NOTHING
    return figure(capacity.rate) + "*" * capacity.cut
