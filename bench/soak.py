"""`python -m bench.soak`: a thousand mixed requests through HTTP while LoRAs come and go; does the memory grow?"""

import asyncio
import base64
import io
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bench import readme
from bench.report import Sheet

SHIPPED = Path(__file__).parents[1] / "models" / "embedded" / "loras" / "crescent.safetensors"
LORAS = 24  # more than the cache below holds
CACHE_MIB = 8  # of LoRAs: a third of them
IN_FLIGHT = 8
WARM = 0.2  # the share of the requests before memory is looked at: caches fill first
EVERY_S = 2.0
WATCHED = {"model": "ServeReplica:model-", "gateway": "ServeReplica:gateway", "upscaler": "ServeReplica:upscaler"}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How much memory each process held after so many requests and seconds, in MiB (resident)."""

    requests: int
    seconds: float
    mib: dict[str, float]


def main(
    requests: Annotated[int, typer.Option(help="In all.", min=20)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the requests and of the LoRAs' coming and going.")] = 1,
    threads: Annotated[int, typer.Option(help="torch threads.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="Folder for soak.json.")] = Path("out/bench"),
    publish: Annotated[bool, typer.Option("--publish", help="Also put the table into bench/README.md.")] = False,
) -> None:
    """Send mixed requests to a server of its own and fit a line to each process's memory."""
    from bench.machine import Machine

    console, machine = Console(), Machine.here(threads)
    with tempfile.TemporaryDirectory() as folder:
        readings, counts = asyncio.run(_soak(Path(folder), requests, seed, threads))
    minutes = readings[-1].seconds / 60
    sheet = sheet_of(readings, requests)
    console.print(sheet.rich())
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    facts = [
        f"{requests} requests ({kinds}), {IN_FLIGHT} in flight, {minutes:.0f} minutes; {LORAS} LoRAs under a cache of "
        f"{CACHE_MIB} MiB, replaced on disk as it went. The line is fitted to what came after the first "
        f"{WARM:.0%}. Machine: {machine}.",
        f"Command: `{' '.join(['python -m bench.soak', *sys.argv[1:]])}`.",
    ]
    for fact in facts:
        console.print(fact, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    (out / "soak.json").write_text(json.dumps([asdict(reading) for reading in readings]) + "\n")
    if publish:
        readme.publish("soak", "\n\n".join([sheet.markdown(), *facts]))


def slope(readings: Sequence[Reading], process: str) -> float:
    """MiB per 1,000 requests: the least-squares line's."""
    counts = [reading.requests for reading in readings]
    line = np.polyfit(counts, [reading.mib[process] for reading in readings], 1)
    return round(float(line[0]) * 1000, 3) + 0.0  # which takes the sign from a zero


def sheet_of(readings: Sequence[Reading], requests: int) -> Sheet:
    """Each process's memory at the line's begin and end, its most, and the line's slope."""
    warm = [reading for reading in readings if reading.requests >= WARM * requests]
    rows = []
    for process in warm[-1].mib:
        lived = [reading for reading in warm if process in reading.mib]  # an upscaler wakes when it is needed
        mib = [reading.mib[process] for reading in lived]
        rows.append([process, f"{mib[0]:.0f}", f"{mib[-1]:.0f}", f"{max(mib):.0f}", f"{slope(lived, process):+.1f}"])
    columns = ("process", f"MiB after {WARM:.0%}", "at the end", "most", "MiB per 1,000 requests")
    return Sheet(title=f"Memory over {requests} mixed requests", columns=columns, rows=rows)


async def _soak(folder: Path, requests: int, seed: int, threads: int) -> tuple[list[Reading], Counter[str]]:
    from bench.server import Server

    churn = Churn(folder, random.Random(seed))
    numbers, readings, counts = iter(range(requests)), [], Counter()
    async with Server(threads, adapters=str(folder), lora_cache_mib=CACHE_MIB) as server:
        started = time.monotonic()

        async def read() -> None:
            mib = await asyncio.to_thread(memory, server.pid)
            readings.append(Reading(requests=counts.total(), seconds=time.monotonic() - started, mib=mib))

        async def client() -> None:
            for number in numbers:
                await asyncio.to_thread(churn.turn)
                kind, body = request(random.Random(f"{seed} {number}"), churn.names)
                await server.post("/v1/generate", body | {"cache": False})
                counts[kind] += 1

        async def watch() -> None:
            with Progress() as progress:
                task = progress.add_task("requests", total=requests)
                while counts.total() < requests:
                    await read()
                    progress.update(task, completed=counts.total())
                    await asyncio.sleep(EVERY_S)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch())
            for _ in range(IN_FLIGHT):
                tasks.create_task(client())
        await read()
    return readings, counts


class Churn:
    """LoRAs in a folder, of which one is replaced by another of the same name before every few requests."""

    def __init__(self, folder: Path, chance: random.Random):
        self.names = [f"lora-{i}" for i in range(LORAS)]
        self._folder, self._chance = folder, chance
        self._tensors = load_file(SHIPPED)
        with safe_open(SHIPPED, "numpy") as file:
            self._metadata = file.metadata()
        for name in self.names:
            self._write(name)

    def turn(self) -> None:
        """Replaces one in five times one of them."""
        if self._chance.random() < 0.2:
            self._write(self._chance.choice(self.names))

    def _write(self, name: str) -> None:
        factor = self._chance.uniform(0.5, 1.5)
        new = self._folder / f".{name}.new"
        factors = {key: factor for key in self._tensors if "lora_up" in key}
        tensors = {key: np.asarray(value * factors.get(key, 1), value.dtype) for key, value in self._tensors.items()}
        save_file(tensors, new, metadata=self._metadata)
        new.rename(self._folder / f"{name}.safetensors")


def request(chance: random.Random, loras: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A request of some kind, all of whose parameters are drawn anew."""
    colours = ("red", "green", "blue", "yellow", "white", "purple")
    body: dict[str, Any] = {
        "model": "sd15",
        "prompt": f"a ({chance.choice(colours)}:{chance.uniform(0.8, 1.3):.2f}) circle on a {chance.choice(colours)} "
        f"background, {chance.randrange(10**6)}",
        "steps": chance.randint(2, 8),
        "seed": chance.randrange(2**32),
        "sampler": chance.choice(("euler_a", "dpmpp_2m", "heun", "ddim", "unipc")),
        "guidance_scale": chance.choice((1.0, 4.0, 7.5)),
        "output_format": chance.choice(("png", "jpeg", "webp")),
        "metadata": chance.choice(("full", "none")),
    }
    kind = chance.choice(("text", "adapters", "adapters", "image", "inpaint", "control", "hires", "upscale"))
    if kind == "adapters":
        body["adapters"] = [{"name": name, "weight": 0.8} for name in chance.sample(loras, chance.randint(1, 2))]
    if kind in ("image", "inpaint"):
        body |= {"image": picture(chance), "denoise_strength": chance.uniform(0.3, 1.0)}
    if kind == "inpaint":
        body["mask"] = mask(chance)
    if kind == "control":
        body["controls"] = [{"name": "canny", "image": picture(chance), "preprocessor": "canny"}]
    if kind == "hires":
        body["hires"] = {"scale": 1.5, "steps": 3, "denoise_strength": 0.6}
    if kind == "upscale":
        body["upscale"] = {"scale": chance.choice((2, 4))}
    return kind, body


def picture(chance: random.Random) -> str:
    """Soft colours, 128 px, as base64 of a PNG."""
    coarse = np.frombuffer(chance.randbytes(48), np.uint8).reshape(4, 4, 3)
    return _packed(Image.fromarray(coarse).resize((128, 128), Image.Resampling.BICUBIC))


def mask(chance: random.Random) -> str:
    """A white box on black, as base64 of a PNG."""
    left, top = chance.randrange(64), chance.randrange(64)
    drawn = Image.new("L", (128, 128))
    drawn.paste(255, (left, top, left + 48, top + 48))
    return _packed(drawn)


def _packed(drawn: Image.Image) -> str:
    packed = io.BytesIO()
    drawn.save(packed, "png")
    return base64.b64encode(packed.getvalue()).decode()


def memory(server: int) -> dict[str, float]:
    """The resident MiB of the application's own processes, those below the server's."""
    found = {}
    for process in psutil.Process(server).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            for name, mark in WATCHED.items():
                if mark in title:
                    found[name] = process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue  # it ended while we looked
    return found


if __name__ == "__main__":
    typer.run(main)
