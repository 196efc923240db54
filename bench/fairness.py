"""`python -m bench.fairness`: a key that sends a request a second, alone and beside one that sends 100 at once."""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer
import yaml
from rich.console import Console

from bench import readme
from bench.machine import Machine, Stolen, watched
from bench.quantile import quantile
from bench.report import NOTHING, Sheet
from bench.serving import HELIOGRAPH, PROJECT, Serving, end_on_sigterm
from bench.simulation import MAX_ROWS, PACE, SECONDS, SIMULATION, simulated

LIGHT, FLOOD = "light", "flood"  # the two keys' names
WARM_UP = 3  # requests that are not counted
BODY: dict[str, Any] = {
    "prompt": "a red circle on a blue background", "width": 128, "height": 128, "guidance_scale": 7.5, "cache": False,
}  # fmt: skip
STEPS = 20  # of the flood's requests
MAX_WAIT_S = 600  # so that a slow machine, too, takes the whole flood on


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request's fate, in seconds since its part of the run began; `sent_s` is when it was to be sent."""

    sent_s: float
    finished_s: float
    status: int

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.sent_s


@dataclass(kw_only=True)
class Part:
    """A part of the run: what became of each key's requests, by its name."""

    title: str
    answers: dict[str, list[Answer]] = field(default_factory=lambda: {LIGHT: [], FLOOD: []})
    stolen: Stolen = field(default_factory=Stolen)

    def good(self, key: str) -> list[Answer]:
        """The answers with a picture, in the order in which they came."""
        return sorted((a for a in self.answers[key] if a.status == 200), key=lambda answer: answer.finished_s)

    def errors(self) -> int:
        return sum(answer.status != 200 for answers in self.answers.values() for answer in answers)

    def latency_s(self, percent: float) -> float:
        """The light key's latency that so many percent of its requests do not exceed (nearest rank)."""
        return quantile([answer.latency_s for answer in self.good(LIGHT)], percent / 100)

    def pictures_per_s(self) -> float:
        """The flood's, over the time to its last picture."""
        good = self.good(FLOOD)
        return len(good) / good[-1].finished_s


class Caller:
    """A client with a key of its own."""

    def __init__(self, address: str, key: str, steps: int):
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {"authorization": f"Bearer {key}", "accept": "image/png"}
        self._client = httpx2.AsyncClient(base_url=address, headers=headers, timeout=None, limits=limits)
        self._body = BODY | {"steps": steps}
        self._seed = 0

    async def ask(self, began: float, sent_s: float) -> Answer:
        self._seed += 1
        answer = await self._client.post("/v1/generate", json=self._body | {"seed": self._seed})
        return Answer(sent_s=sent_s, finished_s=time.monotonic() - began, status=answer.status_code)

    async def close(self) -> None:
        await self._client.aclose()


async def trickle(caller: Caller, goes_on: Callable[[int], bool]) -> list[Answer]:
    """A request every second, whether or not the last one is answered, as long as it goes on after so many."""
    began, asking = time.monotonic(), []
    async with asyncio.TaskGroup() as tasks:
        while goes_on(len(asking)):
            sent_s = float(len(asking))
            await asyncio.sleep(max(0.0, began + sent_s - time.monotonic()))
            asking.append(tasks.create_task(caller.ask(began, sent_s)))
    return [task.result() for task in asking]


async def flood(caller: Caller, requests: int) -> list[Answer]:
    """All at once."""
    began = time.monotonic()
    return list(await asyncio.gather(*(caller.ask(began, 0.0) for _ in range(requests))))


async def measure(light: Caller, other: Caller, seconds: int, requests: int, say: Callable[[str], None]) -> list[Part]:
    """The light key alone, the flood alone, both together for as long as the flood lasts, and the light key again."""
    began = time.monotonic()
    for _ in range(WARM_UP):
        await light.ask(began, 0.0)
    before = await _alone(light, seconds, "a request a second, before", say)
    say(f"{requests} requests at once")
    flooded = Part(title="the flood, alone")
    async with watched(flooded.stolen):
        flooded.answers[FLOOD] = await flood(other, requests)
    say("both")
    both = Part(title="both")
    async with watched(both.stolen):
        flooding = asyncio.create_task(flood(other, requests))
        await asyncio.sleep(0.5)  # which has arrived by then
        both.answers[LIGHT] = await trickle(light, lambda sent: not flooding.done())
        both.answers[FLOOD] = await flooding
    return [before, flooded, both, await _alone(light, seconds, "a request a second, after", say)]


async def _alone(light: Caller, seconds: int, title: str, say: Callable[[str], None]) -> Part:
    say(f"a request a second for {seconds} s")
    part = Part(title=title)
    async with watched(part.stolen):
        part.answers[LIGHT] = await trickle(light, lambda sent: sent < seconds)
    return part


def sheet_of(parts: Sequence[Part], requests: int) -> Sheet:
    """A line for each part, and the light key's ratio to both times that it was alone: machines do not stay as fast."""
    rows = []
    for part in parts:
        light = [f"{part.latency_s(50):.2f}", f"{part.latency_s(95):.2f}"] if part.good(LIGHT) else [NOTHING, NOTHING]
        many = f"{part.pictures_per_s():.2f}" if part.good(FLOOD) else NOTHING
        sent = str(len(part.answers[LIGHT]) or NOTHING)
        rows.append([part.title, sent, *light, many, str(part.errors()), str(part.stolen)])
    before, flooded, both, after = parts
    alone = Part(title="alone")
    alone.answers[LIGHT] = before.answers[LIGHT] + after.answers[LIGHT]
    ratios = [f"{both.latency_s(percent) / alone.latency_s(percent):.2f}" for percent in (50, 95)]
    kept = f"{both.pictures_per_s() / flooded.pictures_per_s():.2f}"
    rows.append(["both / alone", NOTHING, *ratios, kept, NOTHING, NOTHING])
    columns = ("", "its requests", "p50", "p95", "the flood's pictures/s", "errors", "stolen")
    return Sheet(title=f"One request a second beside {requests} at once, two keys, seconds", columns=columns, rows=rows)


def configured(folder: Path, threads: int, simulation: bool) -> dict[str, Any]:
    """The repository's configuration with keys and the benchmarked model alone, its data in the folder."""
    from bench.server import one_model  # which needs torch
    from bench.workloads import MODEL

    shipped = yaml.safe_load((PROJECT / "serve_config.yaml").read_text().replace("data/", f"{folder}/data/"))
    settings = {"threads": 1, "max_rows": MAX_ROWS} if simulation else {"threads": threads}
    config = one_model(shipped, settings | {"max_wait_s": MAX_WAIT_S})
    _gateway(config)["auth"] = "keys"
    return simulated(config, {MODEL: SECONDS}) if simulation else config


def _gateway(config: dict[str, Any]) -> dict[str, Any]:
    return next(one for one in config["applications"] if one["name"] == "gateway")["args"]


async def _run(serving: Serving, steps: int, seconds: int, requests: int, say: Callable[[str], None]) -> list[Part]:
    from app.database import Database
    from app.keys import registry
    from app.keys.caller import Limits

    arguments = _gateway(serving.config)
    say("starting the server")
    end_on_sigterm()
    async with serving:
        database = Database(arguments["database"])
        keys = registry.opened(database, arguments["secret_file"])
        made = {name: (await keys.create(name, ("generate",), Limits()))[1] for name in (LIGHT, FLOOD)}
        await database.close()
        light, other = Caller(serving.address, made[LIGHT], steps), Caller(serving.address, made[FLOOD], STEPS)
        try:
            return await measure(light, other, seconds, requests, say)
        finally:
            await light.close()
            await other.close()


def main(
    seconds: Annotated[int, typer.Option(help="For which the light key is alone, before and after.", min=5)] = 40,
    requests: Annotated[int, typer.Option(help="Of the flood.", min=10)] = 100,
    steps: Annotated[int, typer.Option(help="Of the light key's requests: of many, one a second is not light.")] = 3,
    threads: Annotated[int, typer.Option(help="torch threads, unless said all cores but one.")] = 0,
    simulation: Annotated[bool, typer.Option("--simulated", help="With networks that only take time.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for fairness.json.")] = Path("out/bench"),
    publish: Annotated[bool, typer.Option("--publish", help="Also put the table into bench/README.md.")] = False,
) -> None:
    """Measure what a flood costs another key, through HTTP, on a server of its own with the embedded sd15."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    threads = 1 if simulation else threads or max(1, (os.cpu_count() or 1) - 1)
    console, machine = Console(), Machine.here(threads)

    def say(what: str) -> None:
        console.print(what, highlight=False)

    with tempfile.TemporaryDirectory(prefix="heliograph-bench-") as folder:
        config = configured(Path(folder), threads, simulation)
        serving = Serving(Path(folder), lambda _: config, program=SIMULATION if simulation else HELIOGRAPH)
        parts = asyncio.run(_run(serving, steps, seconds, requests, say))
    sheet = sheet_of(parts, requests)
    facts = [
        f"Requests with guidance at {BODY['width']} px; the light key sends one of {steps} steps every second, "
        f"beside the flood, of {STEPS} steps each, for as long as that lasts. {_device(simulation)} "
        f"Machine: {machine}.",
        "Stolen is what the host gave to others of the cores' time, and of one second's.",
        f"Command: `{' '.join(['python -m bench.fairness', *sys.argv[1:]])}`.",
    ]
    if machine.busy or any(part.stolen.disturbed for part in parts):
        facts.append("The machine was busy, or its host was: these figures are not worth keeping.")
    console.print(sheet.rich())
    for fact in facts:
        say(fact)
    out.mkdir(parents=True, exist_ok=True)
    (out / "fairness.json").write_text(json.dumps([asdict(part) for part in parts]) + "\n")
    if publish:
        readme.publish("fairness-simulated" if simulation else "fairness", "\n\n".join([sheet.markdown(), *facts]))


def _device(simulation: bool) -> str:
    if not simulation:
        return "The networks compute on the processor, which the server and the clients share."
    return f"The networks only take time: {PACE}, the decoder {SECONDS['picture_s']:g} s for a picture."


if __name__ == "__main__":
    typer.run(main)
