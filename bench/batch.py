"""`python -m bench.batch`: a batch job that is killed twice and taken up again, beside the engine alone."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console

from bench import readme
from bench.report import Sheet
from bench.serving import PROJECT
from bench.workloads import MODEL, RequestClass, request_of
from models.events import Event, Failed, Finished
from models.request import GenerationRequest

KIND = RequestClass(128, 8)
ALONE = 4  # the engine alone draws one of so many, before and after
EDGE = 0.05  # of the pictures, at either end, in which steps are not full: left out of a pace
DIE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One run of the job: when it began and ended, the rows that stood in the manifest then, and how it ended."""

    began: float
    ended: float
    recorded: frozenset[int]
    killed: bool


def main(
    prompts: Annotated[int, typer.Option(help="Rows of the job.", min=100)] = 2000,
    kills: Annotated[int, typer.Option(help="How often the job is killed, at random.")] = 2,
    threads: Annotated[int, typer.Option(help="torch threads.")] = os.cpu_count() or 1,
    seed: Annotated[int | None, typer.Option(help="Of the moments at which it is killed; random unless said.")] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Also put the table into bench/README.md.")] = False,
) -> None:
    """Run a job of prompts to its end through kills, check its manifest, and compare its pace with the engine's."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from bench.machine import Machine

    console, machine = Console(), Machine.here(threads)
    chance = random.Random(seed)
    requests = [request_of(KIND, number) for number in range(prompts)]
    with tempfile.TemporaryDirectory(prefix="heliograph-bench-") as name:
        folder = Path(name)
        before = _alone(prompts, threads)
        _prepare(folder, requests, threads)
        legs, twice = [], 0
        for leg in range(kills + 1):
            earlier = _images(folder)
            left = prompts - len(earlier)
            legs.append(_leg(folder, len(earlier) + int(chance.uniform(0.1, 0.6) * left) if leg < kills else None))
            twice += sum(_images(folder)[image] != at for image, at in earlier.items())
        after = _alone(prompts, threads)
        _check(folder, prompts)
        last = sorted(at for at in _images(folder).values() if at >= legs[-1].began)
    sheet = _sheet(before, after, _pace(last), prompts, legs, twice)
    told = ", ".join(f"{leg.ended - leg.began:.0f} s" + (" until it was killed" if leg.killed else "") for leg in legs)
    notes = (
        f"{prompts} prompts ({KIND}); legs: {told}, with {', '.join(str(len(leg.recorded)) for leg in legs)} rows in "
        f"the manifest by then. The manifest was exact. Machine: {machine}."
    )
    console.print(sheet.rich(), notes, sep="\n", highlight=False)
    if machine.busy:
        console.print("The machine was busy: these figures are not worth keeping.")
    if publish:
        readme.publish("batch", f"{sheet.markdown()}\n\n{notes}\n\nCommand: `python -m bench.batch --publish`.")


def _sheet(before: float, after: float, pace: float, prompts: int, legs: list[Leg], twice: int) -> Sheet:
    alone = (before + after) / 2
    rows = [
        ["engine alone, before and after", f"{before:.2f}, {after:.2f}", ""],
        ["batch job, its last leg", f"{pace:.2f}", f"{pace / alone:.2f}"],
        ["batch job, all legs with their starts", f"{prompts / sum(leg.ended - leg.began for leg in legs):.2f}", ""],
        ["pictures drawn twice", str(twice), ""],
    ]
    return Sheet(title="A batch job that was killed", columns=("", "pictures a second", "of the engine"), rows=rows)


def _alone(prompts: int, threads: int) -> float:
    """The pace of the engine in a process of its own, with one of ALONE prompts, all submitted at once."""
    program = "import sys; from bench.batch import draw; draw(int(sys.argv[1]), int(sys.argv[2]))"
    command = [sys.executable, "-c", program, str(prompts), str(threads)]
    ran = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return _pace(json.loads(ran.stdout.splitlines()[-1]))


def draw(prompts: int, threads: int) -> None:
    """Prints when each picture was there. Raises what a request fails with."""
    from bench.inprocess import embedded
    from models.engine import host

    engine, times, failed = host(partial(embedded, threads)), list[float](), list[Failed]()

    def on_event(event: Event) -> None:
        if isinstance(event, Finished):
            times.append(time.time())
        elif isinstance(event, Failed):
            failed.append(event)

    requests = [request_of(KIND, number) for number in range(0, prompts, ALONE)]
    for request in requests:
        engine.submit(request, on_event, progress=False)
    while len(times) < len(requests):
        if failed:
            raise failed[0].error
        time.sleep(0.05)
    engine.close()
    print(json.dumps(times))


def _pace(times: list[float]) -> float:
    """Pictures a second between the edges."""
    times = sorted(times)
    first = max(1, round(EDGE * len(times)))
    middle = times[first:-first]
    return (len(middle) - 1) / (middle[-1] - middle[0])


def _prepare(folder: Path, requests: list[GenerationRequest], threads: int) -> None:
    """The input, and the shipped configuration with the benchmark's threads."""
    fields = ("prompt", "width", "height", "steps", "guidance_scale", "seed", "sampler", "schedule")
    lines = [json.dumps({"id": f"{i:05d}"} | {f: getattr(r, f) for f in fields}) for i, r in enumerate(requests)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    config = yaml.safe_load((PROJECT / "serve_config.yaml").read_text())
    for application in config["applications"]:
        if application["name"] == f"model-{MODEL}":
            application["args"]["threads"] = threads
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _leg(folder: Path, until: int | None) -> Leg:
    """Runs the job, to its end or until about so many rows are recorded. Raises RuntimeError where it fails."""
    words = {"input": folder / "prompts.jsonl", "output": folder / "output", "config": folder / "config.yaml"}
    options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "cluster.batch", *options, "--model", MODEL]
    began = time.time()
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log)
        while process.poll() is None and (until is None or len(_images(folder)) < until):
            time.sleep(0.2)
        if until is not None and process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            psutil.wait_procs(children, timeout=DIE_S)
        code = process.wait()
    if code not in (0, -9):
        raise RuntimeError((folder / "log").read_text()[-2000:])
    return Leg(began=began, ended=time.time(), recorded=_recorded(folder), killed=code != 0)


def _recorded(folder: Path) -> frozenset[int]:
    whole = folder / "output" / "manifest.parquet"
    if whole.exists():
        return frozenset(pq.read_table(whole, columns=["number"])["number"].to_pylist())
    parts = (folder / "output" / "parts").glob("*.jsonl")
    return frozenset(json.loads(line)["number"] for part in parts for line in part.read_text().splitlines())


def _images(folder: Path) -> dict[str, float]:
    """When each picture was stored."""
    images = folder / "output" / "images"
    return {path.name: path.stat().st_mtime for path in images.glob("*.png")} if images.exists() else {}


def _check(folder: Path, prompts: int) -> None:
    """Raises RuntimeError unless the manifest has each row once, without an error, and its picture is there."""
    table = pq.read_table(folder / "output" / "manifest.parquet").to_pylist()
    exact = [(row["number"], row["index"], row["error"]) for row in table] == [(n, 0, None) for n in range(prompts)]
    if not exact or {Path(row["path"]).name for row in table} != set(_images(folder)):
        raise RuntimeError("the manifest is not exact")


if __name__ == "__main__":
    typer.run(main)
