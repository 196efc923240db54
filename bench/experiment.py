"""The experiment: which contender is measured under which load, in which order."""

import io
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from bench.arrivals import poisson
from bench.contender import Contender
from bench.grouped import Grouped
from bench.inprocess import InProcess
from bench.load import Load, Run, Say, driven
from bench.machine import Machine
from bench.openloop import PATIENCE, searched
from bench.plan import Plan
from bench.replay import FIFO, BatchCosts, Trace, best_for_capacity, best_for_saturation
from bench.results import Capacity, Measured, OpenLoop, Results, Saturated, WorkloadResults
from bench.serial import Serial
from bench.server import Server
from bench.workloads import RequestClass, Workload, class_of, request_of, requests_of
from models.request import GenerationRequest

COMMON_SHARE = 0.7  # of B0's saturated throughput: the rate at which every contender's latencies are compared
CAPACITY_GUESS = 0.7  # of a contender's own saturated throughput: where the search for its capacity begins
CHALLENGERS = ("B1", "E", "H")
SEARCHED = ("B1", "E")  # capacity costs many trials; H is compared with E at saturation and at the common rate


class Experiment:
    """One run. `say` is told (what, done, of how many) whenever that changes."""

    def __init__(self, plan: Plan, command: str, say: Say):
        self._plan = plan
        self._say = say
        self.results = Results(machine=Machine.here(plan.threads), command=command, seed=plan.seed)
        self._isolated_s: dict[RequestClass, float] = {}
        self._costs: BatchCosts | None = None
        self._cap: int | None = None  # E's, in rows
        self._pictures: dict[str, dict[int, bytes]] = {}  # B0's, by workload and seed

    async def run(self) -> Results:
        """Everyone in turn, and again: a machine's speed may change within minutes, and ratios are taken in a round."""
        started = time.monotonic()
        names = ("B0", *(name for name in CHALLENGERS if name in self._plan.contenders))
        for _ in range(self._plan.rounds):
            for name in names:
                async with self._opened(name) as contender:
                    if isinstance(contender, Serial) and not self._isolated_s:
                        await self._calibrate(contender)
                    await self._saturate_all(contender)
        for name in names:
            async with self._opened(name) as contender:
                await self._load_all(contender)
        self.results.minutes = round((time.monotonic() - started) / 60, 1)
        return self.results

    def _opened(self, name: str) -> Contender:
        self._say(f"{name}: starting", 0, 1)
        return self._contender(name)

    def _contender(self, name: str) -> Contender:
        threads = self._plan.threads
        match name:
            case "B0":
                return Serial.embedded(threads)
            case "B1":
                return Grouped(threads)
            case "E":
                return InProcess.embedded(threads, cap=self._cap)  # measured in the first round, for all of them
            case _:
                return Server(threads, max_rows=self._cap)

    async def _calibrate(self, serial: Serial) -> None:
        """B0's isolated latencies, from which everyone's deadlines follow, and the batch times that tune B1."""
        kinds = sorted({kind for workload in self._plan.workloads for kind in workload.classes})
        for i, kind in enumerate(kinds):
            self._say("B0: requests alone", i, len(kinds))
            await serial.isolated_s(kind, 1)  # the first of a shape is slow
            self._isolated_s[kind] = await serial.isolated_s(kind, self._plan.repeats)
        if "B1" in self._plan.contenders:
            self._say("B1: batch times for its tuning", 0, 1)
            self._costs = await serial.batch_costs(sorted({kind.side for kind in kinds}), self._plan.group_sizes)
        for workload in self._plan.workloads:
            isolated = {str(kind): self._isolated_s[kind] for kind in workload.classes}
            self.results.workloads.append(
                WorkloadResults(name=workload.name, title=workload.title, isolated_s=isolated)
            )

    async def _saturate_all(self, contender: Contender) -> None:
        """Another round of saturation, under every workload."""
        for workload, results in zip(self._plan.workloads, self.results.workloads, strict=True):
            await self._warm_up(contender, workload)
            saturated = await self._saturate(contender, workload)
            measured = results.of(contender.name)
            if measured is None:
                results.measured.append(Measured(contender.name, contender.title, saturated))
            else:
                measured.saturated = measured.saturated.and_again(saturated)

    async def _load_all(self, contender: Contender) -> None:
        """The capacity under every workload, and the latencies at the common rate."""
        for workload, results in zip(self._plan.workloads, self.results.workloads, strict=True):
            measured = results.of(contender.name)
            assert measured is not None, "everyone was saturated"
            await self._warm_up(contender, workload)
            measured.capacity = await self._capacity(contender, workload, measured.saturated.pictures_per_s)
            if workload is self._plan.compared:
                common = COMMON_SHARE * (results.throughput("B0") or 0.0)
                run = await self._open_loop(contender, workload, common, "common rate", give_up=False)
                measured.common = OpenLoop.of(common, run)

    async def _warm_up(self, contender: Contender, workload: Workload) -> None:
        """Two requests of every class, so that every shape and group has run; not measured."""
        requests = [request_of(kind, seed) for kind in workload.classes for seed in (1, 2)]
        await driven(contender, Load.saturating(requests), f"{workload.title}: warm-up", self._say)

    async def _saturate(self, contender: Contender, workload: Workload) -> Saturated:
        requests = requests_of(workload, self._plan.saturating, self._plan.seed)
        note = ""
        if isinstance(contender, Grouped):
            batching = best_for_saturation(self._trace(requests), self._batch_s)[1]
            await contender.tune(batching)
            note = str(batching)
        if isinstance(contender, InProcess):
            sides = sorted({kind.side for kind in workload.classes})
            self._cap = contender.cap(sides[0])
            note = ", ".join(f"cap of {contender.cap(side)} rows at {side} px" for side in sides)
        run = await driven(contender, Load.saturating(requests), f"{workload.title}: saturated", self._say)
        pictures = {o.request.seed: o.picture for o in run.outcomes if o.request.seed is not None}
        reference = self._pictures.setdefault(workload.name, pictures)  # B0 comes first
        return Saturated(
            rounds=(run.pictures_per_s,),
            rows_per_forward=run.rows_per_forward,
            difference=max(difference(pictures[seed], reference[seed]) for seed in pictures),
            note=note,
        )

    async def _capacity(self, contender: Contender, workload: Workload, throughput: float) -> Capacity | None:
        trace = self._trace(requests_of(workload, self._plan.open_loop, self._plan.seed + 1))
        if isinstance(contender, Serial):
            rate = trace.capacity(lambda rate: trace.latencies_s(rate, FIFO, self._alone_s), 2 * throughput)
            return Capacity(rate=rate, trials=(), note="computed from the times of requests alone")
        if contender.name not in SEARCHED:
            return None
        guess, note = CAPACITY_GUESS * throughput, ""
        if isinstance(contender, Grouped):
            guess, batching = best_for_capacity(trace, self._batch_s, 2 * throughput)
            await contender.tune(batching)
            note = str(batching)

        async def trial(rate: float) -> Run:
            return await self._open_loop(contender, workload, rate, f"capacity, {rate:.2f} a second", give_up=True)

        return await searched(trial, guess, self._plan.refinements, note)

    async def _open_loop(self, contender: Contender, workload: Workload, rate: float, what: str, give_up: bool) -> Run:
        trace = self._trace(requests_of(workload, self._plan.open_loop, self._plan.seed + 1))
        return await driven(contender, trace.load(rate, give_up), f"{workload.title}: {what}", self._say)

    def _trace(self, requests: Sequence[GenerationRequest]) -> Trace:
        limits_s = [PATIENCE * self._isolated_s[class_of(request)] for request in requests]
        return Trace(requests=requests, arrivals=poisson(len(requests), self._plan.seed), limits_s=limits_s)

    def _alone_s(self, batch: Sequence[GenerationRequest]) -> float:
        return sum(self._isolated_s[class_of(request)] for request in batch)

    def _batch_s(self, batch: Sequence[GenerationRequest]) -> float:
        assert self._costs is not None, "measured whenever B1 is"
        return self._costs.batch_s(batch)


def difference(one: bytes, other: bytes) -> int:
    """The largest difference of two pictures at any pixel and channel."""
    a, b = (np.asarray(Image.open(io.BytesIO(data)), np.int16) for data in (one, other))
    return int(np.abs(a - b).max())
