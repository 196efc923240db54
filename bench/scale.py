"""`python -m bench.scale`: the real server with simulated step times at 1 to 32 replicas; where does it bend?"""

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import readme
from bench.arrivals import at_rate, poisson
from bench.crowd import Crowd, Query, Reading
from bench.fleet import Fleet
from bench.machine import Machine
from bench.processes import Meter, replica_mib
from bench.scaling import CLOSED, OPEN, Case, facts, sheets
from bench.serving import PROJECT, free_port

PACED, FREE = "paced", "free"
# Seconds. A forward of 8 rows takes 0.1, so that a replica draws 4 pictures of 20 guided steps in 2; FREE takes none.
TIMES = {
    PACED: {"forward_s": 0.02, "row_s": 0.01, "picture_s": 0.02},
    FREE: {"forward_s": 0.0, "row_s": 0.0, "picture_s": 0.0},
}
SETTINGS: dict[str, Any] = {"max_rows": 8, "defaults": {"max_pixels": 1024 * 1024}}
STEPS = (16, 18, 20, 22, 24)  # in turn, so that pictures do not come in waves
PER_REPLICA = 8  # clients in the closed loop: twice what shares a forward
SHARE = 0.7  # of what the closed loop gave is what arrives in the open one
CLIENTS = 16  # of the gateways
ROOM = 0.9  # of the free memory that new replicas may take: where it is full, Ray ends them
DEFAULT, HAPROXY = "default", "HAProxy"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured: replicas by profile, gateways, and the seconds of each reading."""

    sizes: Mapping[str, tuple[int, ...]]
    gateways: tuple[int, ...]
    free: int  # replicas of the model that takes no time
    warm_s: float
    gateway_s: float
    closed_s: float
    open_s: float

    @property
    def readings(self) -> int:
        return sum(len(self.gateways) * len(QUERIES) + 2 * len(sizes) for sizes in self.sizes.values())


def drawn(**body: Any) -> Query:
    return Query(path="/v1/generate", body={"prompt": "a red circle on a blue background", "cache": False, **body})


def small(number: int) -> Query:
    return drawn(model=FREE, steps=1, guidance_scale=1.0, seed=number)


def large(number: int) -> Query:
    return drawn(model=FREE, steps=1, guidance_scale=1.0, seed=number, width=1024, height=1024)


def paced(number: int) -> Query:
    return drawn(model=PACED, steps=STEPS[number % len(STEPS)], seed=number)


QUERIES: dict[str, Callable[[int], Query]] = {
    "GET /healthz": lambda _: Query(path="/healthz"),
    "a picture of 128 px": small,
    "a picture of 1024 px": large,
}
WHOLE = Plan(
    sizes={DEFAULT: (1, 2, 4, 8, 16, 32), HAPROXY: (1, 8, 32)},
    gateways=(1, 2),
    free=2,
    warm_s=4.0,
    gateway_s=6.0,
    closed_s=20.0,
    open_s=20.0,
)
SHORT = Plan(sizes={DEFAULT: (1, 2)}, gateways=(1,), free=1, warm_s=1.0, gateway_s=3.0, closed_s=6.0, open_s=4.0)


def environment(profile: str) -> dict[str, str]:
    """What Ray is told for a profile. HAProxy gets ports that are free: others may run on this machine."""
    if profile == DEFAULT:
        return {}
    return {
        **high_throughput(),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # nothing is in flight when the server ends
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
    }


def high_throughput() -> dict[str, str]:
    """The environment of the profile with HAProxy, as a cluster is given it."""
    lines = (PROJECT / "cluster" / "high_throughput.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A server that runs under a profile and is measured by a plan. What comes of it is added to `cases`."""

    name: str
    plan: Plan
    fleet: Fleet
    crowd: Crowd
    cases: list[Case]
    say: Say

    async def gateways(self) -> None:
        """Gateways in front of a model that takes no time."""
        await self.fleet.count(f"model-{FREE}", self.plan.free)
        for gateways in self.plan.gateways:
            await self.fleet.count("gateway", gateways)
            for load, query in QUERIES.items():
                self.say(f"{self.name}, gateways {gateways}: {load}")
                reading = await self.crowd.closed(CLIENTS, self.plan.warm_s, self.plan.gateway_s, query)
                self._keep(load, gateways, self.plan.free, reading)
        await self.fleet.count("gateway", 1)
        await self.fleet.count(f"model-{FREE}", 1)

    async def replicas(self, sizes: tuple[int, ...]) -> None:
        """Replicas of the model that takes time, behind one gateway; as many as the memory has room for."""
        running = 1
        for size in sizes:
            if not has_room(size - running, self.cases[-1].mib):
                return
            running = size
            self.say(f"{self.name}, replicas {size}: starting")
            await self.fleet.count(f"model-{PACED}", size)
            self.say(f"{self.name}, replicas {size}: {CLOSED}")
            closed = await self.crowd.closed(PER_REPLICA * size, self.plan.warm_s, self.plan.closed_s, paced)
            self._keep(CLOSED, 1, size, closed)
            self.say(f"{self.name}, replicas {size}: {OPEN}")
            rate = SHARE * closed.per_s
            arrivals = at_rate(poisson(max(1, round(rate * self.plan.open_s)), seed=1), rate)
            self._keep(OPEN, 1, size, await self.crowd.opened(arrivals, paced))

    def _keep(self, load: str, gateways: int, replicas: int, reading: Reading) -> None:
        mib = max(replica_mib(self.fleet.pid))
        case = Case(profile=self.name, gateways=gateways, replicas=replicas, load=load, reading=reading, mib=mib)
        self.cases.append(case)


def has_room(replicas: int, mib: float) -> bool:
    """Whether the memory that is free takes so many replicas more."""
    return replicas * mib * 2**20 < ROOM * psutil.virtual_memory().available


async def measure(plan: Plan, cases: list[Case], say: Say) -> None:
    """Adds to the cases what each profile does, as it becomes known."""
    for name, sizes in plan.sizes.items():
        say(f"{name}: starting")
        async with Fleet(TIMES, environment(name), **SETTINGS) as fleet:
            async with Crowd(fleet.address, Meter(fleet.pid)) as crowd:
                profile = Profile(name=name, plan=plan, fleet=fleet, crowd=crowd, cases=cases, say=say)
                await profile.gateways()
                await profile.replicas(sizes)
            say(f"{name}: stopping")


def main(
    short: Annotated[bool, typer.Option("--short", help="Two replicas, two minutes; the figures mean little.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for scale.json.")] = Path("out/bench"),
    publish: Annotated[bool, typer.Option("--publish", help="Also put the tables into bench/README.md.")] = False,
) -> None:
    """Measure how the real server scales where models only take time: gateways, replicas, with HAProxy and without."""
    console, machine, plan, cases = Console(), Machine.here(1), SHORT if short else WHOLE, []
    columns = (TextColumn("{task.description:<48}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("", total=plan.readings)

        def say(what: str) -> None:
            progress.update(task, description=what, completed=len(cases))

        try:
            asyncio.run(measure(plan, cases, say))
        finally:  # what was measured before a fault is worth keeping
            write(out / "scale.json", cases, machine)
        progress.update(task, description="done", completed=len(cases))
    told = [*facts(cases, machine.cores), *left_out(plan, cases), f"Machine: {machine}."]
    told.append(f"Command: `{' '.join(['python -m bench.scale', *sys.argv[1:]])}`.")
    if machine.busy:
        told.append("The machine was busy with something else: these figures are not worth keeping.")
    for sheet in sheets(cases):
        console.print(sheet.rich())
    console.print(*told, sep="\n", highlight=False)
    if publish:
        readme.publish("scale", "\n\n".join([*(sheet.markdown() for sheet in sheets(cases)), *told]))


def left_out(plan: Plan, cases: list[Case]) -> list[str]:
    """What of the plan the memory had no room for."""
    tried = {(case.profile, case.replicas) for case in cases if case.load == CLOSED}
    missing = [(name, size) for name, sizes in plan.sizes.items() for size in sizes if (name, size) not in tried]
    return [f"{name}: the memory has no room for {size} replicas." for name, size in missing]


def write(file: Path, cases: list[Case], machine: Machine) -> None:
    """All figures, as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"machine": asdict(machine), "times": TIMES, "cases": [case.as_json() for case in cases]}
    file.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
