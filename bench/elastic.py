"""`python -m bench.elastic`: a load that rises, holds and stops; replicas by work against Serve's own policy.

Both have the same trace, bounds, delays and replicas, whose networks only take time (bench/simulated.py): a small
machine has room for several. Gateway, proxy, router, policy and engines are the real ones.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer
import yaml
from rich.console import Console
from rich.progress import Progress, TaskID

from app.deployment import WORK_POLICY
from bench import readme
from bench.chart import Panel, Points, draw
from bench.quantile import quantile
from bench.replicas import Count, count, replica_seconds, watch
from bench.report import Sheet
from bench.serving import PROJECT, Serving, end_on_sigterm
from bench.simulation import MAX_ROWS, PACE, SECONDS, SIMULATION, simulated
from bench.trace import LONG, SHORT, Answer, Arrival, Shape, replay, trace
from bench.workloads import MODEL

APPLICATION = f"model-{MODEL}"
MOST = 6  # replicas
DELAYS = {
    "metrics_interval_s": 1,
    "look_back_period_s": 15,
    "upscale_delay_s": 2,
    "downscale_delay_s": 20,
    "downscale_to_zero_delay_s": 15,
}
ASLEEP_S = 120.0  # until the last replica has gone
WINDOW_S = 10.0  # of the chart's percentiles
QUICK = Shape(few_s=5, rise_s=15, hold_s=25)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to choose how many replicas there are, and which of them gets a request."""

    name: str
    args: Mapping[str, Any]  # of the model
    scaling: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a contender made of the trace."""

    contender: str
    answers: Sequence[Answer]
    counts: Sequence[Count]

    @property
    def failed(self) -> int:
        return sum(bool(answer.error) for answer in self.answers)

    def percentile(self, percent: float, of: Callable[[Answer], float], steps: int | None = None) -> float:
        """Of all answers, or of those of so many steps (nearest rank)."""
        return quantile([of(one) for one in self.answers if steps in (None, one.arrival.steps)], percent / 100)


def contenders(drain_s: float, hold_s: float, target: float) -> tuple[Contender, Contender]:
    """By work, and as Serve does it unless told otherwise."""
    policy = {"policy_function": WORK_POLICY, "policy_kwargs": {"drain_s": drain_s}}
    return (
        Contender(
            name="by work",
            args={"routing": "work", "hold_s": hold_s},
            scaling={"policy": policy, "aggregation_function": "max"},
        ),
        Contender(name="by requests", args={"routing": "default"}, scaling={"target_ongoing_requests": target}),
    )


def configuration(folder: Path, contender: Contender) -> dict[str, Any]:
    """The repository's configuration with one simulated model that sleeps, its data in the folder, and no more."""
    shipped = yaml.safe_load((PROJECT / "serve_config.yaml").read_text().replace("data/", f"{folder}/data/"))
    by_name = {application["name"]: application for application in shipped["applications"]}
    model, gateway = by_name[APPLICATION], by_name["gateway"]
    del gateway["args"]["jobs"]
    settings = {"max_rows": MAX_ROWS, "max_waiting": 1000, "threads": 1, **contender.args}
    model["args"] = {key: model["args"][key] for key in ("name", "family", "source")} | settings
    model["deployments"][0]["autoscaling_config"] = {
        "min_replicas": 0,
        "max_replicas": MOST,
        **DELAYS,
        **contender.scaling,
    }
    offered = {"models": [model["args"]], "default_model": MODEL}
    gateway["deployments"][0]["user_config"] = json.loads(json.dumps(offered))  # the model's own args get seconds below
    return simulated(shipped | {"applications": [model, gateway]}, {MODEL: SECONDS})


async def measure(contender: Contender, arrivals: Sequence[Arrival], done: Callable[[], None]) -> Result:
    """Serves the trace from a model that sleeps, and waits until it sleeps again."""
    counts: list[Count] = []
    with tempfile.TemporaryDirectory(prefix="heliograph-elastic-") as name:
        folder, program = Path(name), (*SIMULATION, "--environment", "RAY_AUTH_MODE=disabled")
        async with (
            Serving(folder, lambda _: configuration(folder, contender), program=program) as serving,
            httpx2.AsyncClient(base_url=await serving.dashboard(), timeout=10) as dashboard,
        ):
            await _asleep(dashboard)  # it has drawn a first picture, for /readyz
            since = time.monotonic()
            watching = asyncio.create_task(watch(dashboard, APPLICATION, since, counts.append))
            answers = await replay(serving.address, arrivals, done)
            await _asleep(dashboard)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            counts.append(await count(dashboard, APPLICATION, since))
    return Result(contender=contender.name, answers=answers, counts=counts)


async def _asleep(dashboard: httpx2.AsyncClient) -> None:
    async with asyncio.timeout(ASLEEP_S):
        while True:
            with suppress(httpx2.HTTPError):
                if not (await count(dashboard, APPLICATION)).held:
                    return
            await asyncio.sleep(1.0)


def sheet_of(results: Sequence[Result]) -> Sheet:
    """One line for each contender, in seconds."""
    kinds = [f"{share} of {steps} steps" for steps in (SHORT, LONG) for share in ("p50", "p95")]
    columns = [
        "seconds",
        "wait p50",
        "wait p95",
        "p50",
        "p95",
        *kinds,
        "first",
        "replicas",
        "replica-seconds",
        "failed",
    ]
    return Sheet(title="A load that rises, holds and stops", columns=columns, rows=[_row(result) for result in results])


def _row(result: Result) -> list[str]:
    waits = [result.percentile(percent, lambda answer: answer.wait_s) for percent in (50, 95)]
    latencies = [
        result.percentile(percent, lambda answer: answer.latency_s, steps)
        for steps in (None, SHORT, LONG)
        for percent in (50, 95)
    ]
    first = next(answer.latency_s for answer in result.answers if answer.arrival.at_s == 0)
    figures = [f"{seconds:.2f}" for seconds in (*waits, *latencies, first)]
    held = f"{replica_seconds(result.counts):.0f}"
    return [result.contender, *figures, _path(result.counts), held, str(result.failed)]


def _path(counts: Sequence[Count]) -> str:
    """The numbers of replicas that took requests, by their turning points and the last one: 0, 1, 4, 1, 0."""
    told: list[int] = []
    for number in (one.running for one in counts):
        if told[-1:] == [number]:
            continue
        if len(told) > 1 and (told[-2] < told[-1] < number or told[-2] > told[-1] > number) and told[-1] > 1:
            told[-1] = number
        else:
            told.append(number)
    return ", ".join(map(str, told))


def chart(shape: Shape, results: Sequence[Result], path: Path) -> None:
    """The load, the replicas and the waits over time."""
    end = max((one.at_s for result in results for one in result.counts), default=shape.seconds)
    seconds = [float(second) for second in range(round(end) + 1)]
    load = [(second, shape.rate(second) if second < shape.seconds else 0.0) for second in seconds]
    panels = [
        Panel(title="requests a second", series={"load": load}),
        Panel(
            title="replicas", series={r.contender: [(c.at_s, c.running) for c in r.counts] for r in results}, steps=True
        ),
        Panel(title=f"p95 of waits, in windows of {WINDOW_S:.0f} s", series={r.contender: _waits(r) for r in results}),
    ]
    draw(panels, path)


def _waits(result: Result) -> Points:
    windows: dict[int, list[float]] = {}
    for answer in result.answers:
        windows.setdefault(int(answer.arrival.at_s // WINDOW_S), []).append(answer.wait_s)
    return [(WINDOW_S * (number + 0.5), quantile(waits, 0.95)) for number, waits in sorted(windows.items())]


async def compare(ways: Sequence[Contender], arrivals: Sequence[Arrival], progress: Progress) -> list[Result]:
    """Each of them, one after another."""
    end_on_sigterm()
    tasks: list[TaskID] = [progress.add_task(way.name, total=len(arrivals)) for way in ways]
    return [
        await measure(way, arrivals, lambda task=task: progress.advance(task))
        for way, task in zip(ways, tasks, strict=True)
    ]


def main(
    seed: Annotated[int, typer.Option(help="Of the trace.")] = 1,
    drain_s: Annotated[float, typer.Option(help="Of the work policy.")] = 6.0,
    hold_s: Annotated[float, typer.Option(help="Of the work router.")] = 5.0,
    target: Annotated[float, typer.Option(help="Ongoing requests a replica is to have, for Serve's policy.")] = 8.0,
    quick: Annotated[bool, typer.Option("--quick", help="A short trace, whose figures mean little.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for elastic.json and elastic.png.")] = Path("out/bench"),
    publish: Annotated[bool, typer.Option("--publish", help="Also put table and chart into bench/.")] = False,
) -> None:
    """Replay a trace of 4- and 50-step requests against a model that sleeps, scaled by work and by Serve's default."""
    from bench.machine import Machine

    console, machine = Console(), Machine.here(1)
    shape = QUICK if quick else Shape()
    arrivals = trace(shape, seed)
    with Progress(console=console, refresh_per_second=1) as progress:
        results = asyncio.run(compare(contenders(drain_s, hold_s, target), arrivals, progress))
    sheet = sheet_of(results)
    console.print(sheet.rich())
    facts = _facts(arrivals, shape, f"drain_s {drain_s:g}", f"hold_s {hold_s:g}", target, machine)
    console.print(*facts, *sorted({a.error for r in results for a in r.answers if a.error}), sep="\n", highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    (out / "elastic.json").write_text(json.dumps([asdict(result) for result in results]) + "\n")
    chart(shape, results, out / "elastic.png")
    if publish:
        chart(shape, results, Path(__file__).with_name("elastic.png"))
        picture = "![Load, replicas and waits over time](elastic.png)"
        readme.publish("elastic", "\n\n".join([sheet.markdown(), picture, *facts]))


def _facts(arrivals: Sequence[Arrival], shape: Shape, drain: str, hold: str, target: float, machine: Any) -> list[str]:
    delays = ", ".join(f"{name} {value}" for name, value in DELAYS.items())
    return [
        f"{len(arrivals)} requests, half of {SHORT} and half of {LONG} steps, at most {shape.peak:g} a second; 0 to "
        f"{MOST} replicas, {delays}. By work: WorkPolicy with {drain}, WorkRouter with {hold}. By requests: Serve's "
        f"default policy with target_ongoing_requests {target:g}, Serve's default router. In a replica {PACE}.",
        "All requests are one caller's. Wait: all of a request's time that was not work on it. First: the first "
        "request's, which wakes the model. Replica-seconds count replicas that load or stop, too.",
        f"Machine: {machine}.",
        f"Command: `{' '.join(['python -m bench.elastic', *sys.argv[1:]])}`.",
    ]


if __name__ == "__main__":
    typer.run(main)
