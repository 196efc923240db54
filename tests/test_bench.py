"""The benchmark's own honesty: arrivals, latencies, capacity, and that the contenders draw the same pictures."""

import asyncio
import selectors
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bench.arrivals import at_rate, poisson
from bench.capacity import COARSE, highest, search
from bench.contender import Work
from bench.load import Load, Outcome, Run, drive
from bench.machine import Machine
from bench.readme import publish
from bench.replay import FIFO, BatchCosts, Batching, Trace, best_for_saturation
from bench.report import markdown
from bench.results import Capacity, Measured, OpenLoop, Results, Saturated, WorkloadResults
from bench.workloads import (
    EQUAL,
    MIXED_SIZES,
    MIXED_STEPS,
    WORKLOADS,
    RequestClass,
    Workload,
    class_of,
    request_of,
    requests_of,
)
from models.request import GenerationRequest

REQUEST = request_of(RequestClass(128, 20), 1)


class Sleeper:
    """A contender that serves one request at a time, in so many seconds each."""

    name, title = "S", "sleeper"

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> "Sleeper":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def generate(self, request: GenerationRequest) -> bytes:
        async with self._lock:
            await asyncio.sleep(self._seconds)
        return b""

    async def work(self) -> Work:
        return Work()


def open_loop(arrivals_s: list[float], limit_s: float, give_up: bool = False) -> Load:
    n = len(arrivals_s)
    return Load(requests=[REQUEST] * n, arrivals_s=arrivals_s, limits_s=[limit_s] * n, give_up=give_up)


def test_arrivals_are_the_seeds_and_have_the_rate():
    assert poisson(50, 3) == poisson(50, 3) != poisson(50, 4)
    times = at_rate(poisson(20_000, 1), 4.0)
    assert times == sorted(times)
    assert 20_000 / times[-1] == pytest.approx(4.0, rel=0.03)


def test_every_rate_gets_the_same_arrivals_stretched():
    assert at_rate(at_rate(poisson(10, 1), 2.0), 0.5) == pytest.approx(poisson(10, 1))


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda w: w.name)
def test_a_workload_has_its_shares_and_is_seeded(workload: Workload):
    requests = requests_of(workload, 100, 5)
    assert requests == requests_of(workload, 100, 5) != requests_of(workload, 100, 6)
    assert len({request.seed for request in requests}) == 100
    kinds = [class_of(request) for request in requests]
    assert {kind: kinds.count(kind) for kind in workload.classes} == dict(workload.shares)


def test_the_workloads_are_those_of_the_readme():
    assert EQUAL.classes == [RequestClass(128, 20)]
    assert {kind.steps for kind in MIXED_STEPS.classes} == {20, 30, 50}
    assert {kind.side for kind in MIXED_SIZES.classes} == {128, 192}


class SkippingSelector(selectors.DefaultSelector):
    """Instead of waiting, moves the clock on: a test of timing then depends on no machine."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits and nobody is due"
        self.now += timeout
        return super().select(0)


def in_virtual_time(work: Coroutine[Any, Any, Run]) -> Run:
    selector = SkippingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


def test_latency_counts_from_the_scheduled_arrival():
    """Three arrive at once at a server that takes 0.1 s each: the third has waited for two others."""
    run = in_virtual_time(drive(Sleeper(0.1), open_loop([1.0, 1.0, 1.0], limit_s=0.25)))
    assert [o.latency_s for o in run.outcomes] == pytest.approx([0.1, 0.2, 0.3])
    assert run.attainment == pytest.approx(2 / 3)
    assert not run.passed


async def test_a_client_kept_from_sending_counts_its_wait():
    """A contender that blocks the load generator itself cannot hide the delay."""

    class Blocker(Sleeper):
        async def generate(self, request: GenerationRequest) -> bytes:
            time.sleep(0.1)  # noqa: ASYNC251 - blocking is the point
            return b""

    run = await drive(Blocker(0.0), open_loop([0.0, 0.02, 0.04], limit_s=1.0))
    assert max(o.latency_s for o in run.outcomes) > 0.25


def test_a_run_that_cannot_pass_is_given_up():
    late = open_loop([0.01 * i for i in range(100)], limit_s=0.1, give_up=True)
    run = in_virtual_time(drive(Sleeper(0.05), late))
    assert len(run.outcomes) < 30
    assert run.planned == 100
    assert run.attainment < 0.1
    passing = in_virtual_time(drive(Sleeper(0.01), open_loop([0.02 * i for i in range(20)], limit_s=0.5, give_up=True)))
    assert len(passing.outcomes) == 20
    assert passing.passed


def test_percentiles_are_nearest_ranks():
    outcomes = tuple(
        Outcome(request=REQUEST, arrival_s=1.0, finished_s=1.0 + i, limit_s=1.0, picture=b"") for i in range(1, 101)
    )
    run = Run(outcomes=outcomes, planned=100, work=Work(forwards=4, rows=10))
    assert (run.latency_s(50), run.latency_s(99), run.rows_per_forward) == (50.0, 99.0, 2.5)
    assert run.pictures_per_s == pytest.approx(1.0)


@pytest.mark.parametrize("guess", [0.4, 1.0, 3.0])
async def test_the_search_finds_the_capacity_of_a_server_that_has_one(guess: float):
    tried: list[float] = []

    async def passes(rate: float) -> bool:
        tried.append(rate)
        return rate <= 1.3

    found = await search(passes, guess, refinements=2)
    assert 1.3 / COARSE**0.25 <= found <= 1.3
    assert len(tried) == len(set(tried)) <= 10


async def test_a_server_that_never_passes_has_no_capacity():
    async def passes(rate: float) -> bool:
        return False

    assert await search(passes, 1.0) == 0.0
    assert highest(lambda rate: False, 0.1, 1.0) == 0.0
    assert highest(lambda rate: rate <= 0.7, 0.1, 1.0) == pytest.approx(0.7, rel=0.02)


def test_a_replay_tells_what_a_run_finds():
    requests, arrivals = [REQUEST] * 12, [0.0, 0.1, 0.2, 3.0, 3.0, 3.0, 5.0, 9.0, 9.1, 9.2, 9.3, 12.0]
    trace = Trace(requests=requests, arrivals=arrivals, limits_s=[1.0] * 12)
    replayed = trace.latencies_s(20.0, FIFO, lambda batch: 0.03)
    run = in_virtual_time(drive(Sleeper(0.03), open_loop(at_rate(arrivals, 20.0), 1.0)))
    assert [o.latency_s for o in run.outcomes] == pytest.approx(replayed)


def test_a_replay_serves_whoever_is_like_the_oldest_when_it_is_free():
    """0 alone until 1; then 1 and 3, which are alike, until 2; then 2, of more steps, and 4, which came meanwhile."""
    other = request_of(RequestClass(128, 30), 9)
    requests = [REQUEST, REQUEST, other, REQUEST, REQUEST]
    trace = Trace(requests=requests, arrivals=[0.0, 0.2, 0.3, 0.4, 2.5], limits_s=[1.0] * 5)
    assert trace.when_free_s(1.0, 2, lambda batch: 1.0) == pytest.approx([1.0, 1.8, 2.7, 1.6, 1.5])
    assert trace.when_free_s(1.0, 1, lambda batch: 1.0) == trace.latencies_s(1.0, FIFO, lambda batch: 1.0)


def test_a_replay_forms_batches_as_serve_does():
    """A batch closes when it is full or its wait is over, whether or not the server is busy."""
    trace = Trace(requests=[REQUEST] * 4, arrivals=[0.0, 0.1, 0.2, 5.0], limits_s=[1.0] * 4)
    latencies = trace.latencies_s(1.0, Batching(max_size=2, wait_s=0.5), lambda batch: 1.0)
    # {0, 1} full at 0.1, done at 1.1; {2} waits from 0.2 to 0.7, then for the server: done at 2.1; {3} from 5.5
    assert latencies == pytest.approx([1.1, 1.0, 1.9, 1.5])


def test_batch_costs_add_up_by_groups_and_lie_between_what_was_measured():
    costs = BatchCosts(fixed_s={(128, 1): 0.1, (128, 4): 0.4}, step_s={(128, 1): 0.01, (128, 4): 0.02})
    alone = request_of(RequestClass(128, 50), 1)
    assert costs.batch_s([alone]) == pytest.approx(0.1 + 50 * 0.01)
    assert costs.batch_s([REQUEST, alone, REQUEST]) == pytest.approx(0.6 + 0.2 + 20 * (0.01 + 0.01 / 3))
    trace = Trace(requests=[REQUEST] * 8, arrivals=poisson(8, 1), limits_s=[1.0] * 8)
    assert best_for_saturation(trace, costs.batch_s)[1].max_size > 1


def test_the_tables_say_what_was_not_measured():
    trial = OpenLoop(rate=0.5, attainment=1.0, p50_s=1.0, p99_s=2.0, rows_per_forward=None)
    baseline = Measured(
        contender="B0",
        title="alone",
        saturated=Saturated(rounds=(1.0, 0.5, 1.2), rows_per_forward=2.0, difference=0),
        capacity=Capacity(rate=0.4, trials=()),
        common=trial,
    )
    engine = Measured(
        contender="E",
        title="ours",
        saturated=Saturated(rounds=(2.5, 1.0, 3.6), rows_per_forward=9.0, difference=1),
        capacity=Capacity(rate=0.8, trials=(trial,)),
        common=trial,
    )
    workload = WorkloadResults(name="steps", title="mixed steps", isolated_s={}, measured=[baseline, engine])
    results = Results(machine=Machine.here(2), command="python -m bench", seed=1, workloads=[workload])
    assert "| mixed steps | 2.50 (2.50, 2.00, 3.00) | 2.50 (2.50, 2.00, 3.00) | – | 2.00 |" in markdown(results)
    assert "by round: 1.00, 0.50, 1.20 pictures a second" in markdown(results)
    assert "| E | 2.50 | 9.0 | 0.80 |" in markdown(results)


def test_a_table_replaces_what_stands_between_its_own_marks(tmp_path):
    text = "before\n<!-- one: begin -->\n{}\n<!-- one: end -->\nbetween\n<!-- two: begin -->\n<!-- two: end -->\n"
    readme = tmp_path / "README.md"
    readme.write_text(text.format("old"))
    publish("one", "new", readme)
    assert readme.read_text() == text.format("new")
    with pytest.raises(ValueError, match="marks"):
        publish("three", "new", readme)
    assert readme.read_text() == text.format("new")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers on numpy 2
async def test_the_engine_draws_what_the_pipeline_draws_in_fewer_forwards():
    from bench.experiment import difference
    from bench.inprocess import InProcess, embedded
    from bench.serial import Serial

    requests = [request_of(RequestClass(128, steps), seed) for seed, steps in enumerate((4, 6, 6, 8))]
    # one thread, and no cap measured: two threads are slow for want of each other when other tests run beside
    async with Serial.embedded(threads=1) as serial:
        alone = await drive(serial, Load.saturating(requests))
    async with InProcess(lambda: embedded(threads=1, warm_up=False)) as engine:
        together = await drive(engine, Load.saturating(requests))
    assert alone.work == Work(forwards=24, rows=48)
    assert together.work is not None
    assert together.work.rows == 48
    assert together.work.forwards < 24
    pictures = {o.request.seed: o.picture for o in alone.outcomes}
    assert all(difference(o.picture, pictures[o.request.seed]) <= 1 for o in together.outcomes)


async def test_static_batches_hold_equal_requests_and_have_few_sizes():
    from bench.static import Static

    calls: list[list[int | None]] = []

    class Drawing:
        work = Work()

        def draw(self, requests: list[GenerationRequest]) -> list[np.ndarray]:
            calls.append([request.steps for request in requests])
            if requests[0].steps == 50:
                raise RuntimeError("out of memory")
            return [np.zeros((8, 8, 3), np.uint8) for _ in requests]

        def close(self) -> None:
            pass

    steps = (20, 30, 20, 20, 20, 50)
    requests = [request_of(RequestClass(128, steps), seed) for seed, steps in enumerate(steps)]
    with ThreadPoolExecutor(max_workers=1) as worker:
        async with Static(Drawing, (1, 4), worker, name="S", title="static") as static:  # type: ignore[arg-type]
            drawn = await asyncio.gather(*map(static.generate, requests), return_exceptions=True)
            one_more = await asyncio.gather(*map(static.generate, requests[:3]))
            work = await static.work()
    assert calls == [[20] * 4, [30], [50], [20] * 4, [30]]
    assert [isinstance(picture, bytes) for picture in [*drawn, *one_more]] == [True] * 5 + [False] + [True] * 3
    assert work.padded == 2 * 2 * 20  # of the last four, two pictures were asked for


@pytest.mark.parametrize(
    ("name", "row", "decode"), [("sd15", 0.8033, 2.515), ("sd21", 2.1491, 5.754), ("sdxl", 6.7612, 10.47)]
)
def test_the_full_size_networks_are_the_real_ones(name: str, row: float, decode: float):
    """By the number of parameters, and by arithmetic (2 FLOP for a multiply-add, in units of 1e12)."""
    import torch

    from bench.fullsize import NETWORKS, Flops, autoencoder, unet

    network = NETWORKS[name]
    with torch.device("meta"):
        denoiser, decoder = unet(network), autoencoder(network)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == network.parameters
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 83_653_863
    flops = Flops.count({"unet": denoiser, "vae": decoder}, network.side)
    assert flops.row / 1e12 == pytest.approx(row, rel=1e-3)
    assert flops.decode / 1e12 == pytest.approx(decode, rel=1e-3)


def test_drift_is_that_of_the_nearest_picture():
    import torch

    from bench.drift import nearest

    reference = torch.ones(4, 8, 8)
    assert nearest(reference, [-reference, 1.01 * reference]) == pytest.approx(0.01, rel=1e-3)


def test_hits_are_told_in_milliseconds():
    from bench.hits import sheet_of

    sheet = sheet_of({"a hit": [0.001 * i for i in range(1, 102)]})
    assert sheet.rows == [["a hit", "51.0", "96.0", "100.0"]]
