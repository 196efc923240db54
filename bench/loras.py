"""`python -m bench.loras`: eight pictures with eight different LoRAs in one batch, against none and one by one."""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from bench import readme

if TYPE_CHECKING:
    import torch

    from bench.report import Sheet
    from models.request import GenerationRequest

BATCH = 8
# What kohya's trainer adapts when nothing else is said: all of the attention blocks, and the text encoder.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way to draw the eight pictures: the median round's seconds, by the clock and of the processor."""

    name: str
    title: str
    wall_s: float
    cpu_s: float


def main(
    rank: Annotated[int, typer.Option(help="Of every LoRA.")] = 8,
    steps: Annotated[int, typer.Option(help="Of every picture, with guidance at each.")] = 20,
    rounds: Annotated[int, typer.Option(help="Each way is measured so often, in turns; the median counts.")] = 7,
    threads: Annotated[int, typer.Option(help="torch threads, for everyone alike.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="Folder for loras.json and loras.md.")] = Path("out/bench"),
    publish: Annotated[bool, typer.Option("--publish", help="Also put the table into bench/README.md.")] = False,
) -> None:
    """Measure what mixed LoRAs cost: throughput of 8 different ones in one batch, on the embedded sd15 at 128 px."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from bench.machine import Machine

    console = Console()
    machine = Machine.here(threads)
    with tempfile.TemporaryDirectory() as folder:
        ways = _ways(Path(folder), rank, steps, threads)
        found = measure(ways, rounds)
    sheet = sheet_of(found)
    console.print(sheet.rich())
    facts = [
        f"{BATCH} pictures of {steps} steps with guidance, LoRAs of rank {rank} on every layer of the attention blocks "
        f"and of the text encoder; median of {rounds} rounds, taken in turns. Machine: {machine}.",
        *(["The machine was busy: these figures are not worth keeping."] if machine.busy else []),
        f"Command: `{' '.join(['python -m bench.loras', *sys.argv[1:]])}`.",
    ]
    text = "\n\n".join([sheet.markdown(), *facts])
    for fact in facts:
        console.print(fact, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    (out / "loras.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    (out / "loras.md").write_text(text + "\n")
    if publish:
        readme.publish("loras", text)


def measure(ways: dict[str, tuple[str, Callable[[], None]]], rounds: int) -> list[Measured]:
    """Each way in turn, `rounds` times after one that does not count, so that what disturbs one disturbs all."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in track(range(rounds + 1), description="rounds", transient=True):
        for name, (_, draw) in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            draw()
            if number:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return [
        Measured(
            name=name,
            title=title,
            wall_s=statistics.median(wall for wall, _ in seconds[name]),
            cpu_s=statistics.median(cpu for _, cpu in seconds[name]),
        )
        for name, (title, _) in ways.items()
    ]


def sheet_of(found: Sequence[Measured]) -> "Sheet":
    """Pictures a second, and as a share of the first way's."""
    from bench.report import Sheet

    base, one_by_one = found[0], next(one for one in found if one.name == "one by one")
    return Sheet(
        title=f"{BATCH} pictures with {BATCH} different LoRAs, sd15 at 128 px",
        columns=("", "pictures/s", "of none", "of one by one", "CPU s per picture"),
        rows=[
            [
                one.title,
                f"{BATCH / one.wall_s:.2f}",
                f"{base.wall_s / one.wall_s:.2f}",
                f"{one_by_one.wall_s / one.wall_s:.2f}",
                f"{one.cpu_s / BATCH:.2f}",
            ]
            for one in found
        ],
    )


def _ways(folder: Path, rank: int, steps: int, threads: int) -> dict[str, tuple[str, Callable[[], None]]]:
    from bench.inprocess import embedded
    from bench.workloads import RequestClass, request_of
    from models.parts import AdapterUse

    engine = embedded(threads, warm_up=False, adapters=folder)
    engine.batcher.set_cap((4, 16, 16), 2 * BATCH)
    write_random_loras(folder, engine.family.networks, rank)
    plain = [request_of(RequestClass(128, steps), seed) for seed in range(BATCH)]
    uses = [(AdapterUse(name=f"lora-{i}"),) for i in range(BATCH)]
    mixed = [replace(request, adapters=use) for request, use in zip(plain, uses, strict=True)]
    same = [replace(request, adapters=uses[0]) for request in plain]
    return {
        "none": ("no LoRA, one batch", lambda: engine.generate(plain)),
        "same": ("one LoRA for all, one batch", lambda: engine.generate(same)),
        "mixed": (f"{BATCH} different LoRAs, one batch", lambda: engine.generate(mixed)),
        "one by one": (f"{BATCH} different LoRAs, one by one", lambda: [engine.generate([one]) for one in mixed]),
        "diffusers": ("the same in diffusers", by_diffusers(folder, mixed, threads)),
    }


def write_random_loras(
    folder: Path, networks: "Mapping[str, torch.nn.Module]", rank: int, layers: Sequence[str] = LAYERS
) -> None:
    """`lora-0` to `lora-7` of random numbers, with peft's names: arithmetic does not ask what has been learned.

    `layers` are the ends of the names of those in the UNet.
    """
    import torch
    from safetensors.torch import save_file

    for number in range(BATCH):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, network in networks.items():
            for path, module in network.named_modules():
                if path.endswith(tuple(layers) if name == "unet" else TEXT_LAYERS):
                    outputs, inputs, *window = module.weight.shape
                    shapes = {"lora_A": (rank, inputs, *window), "lora_B": (outputs, rank, *window)}
                    for half, shape in shapes.items():
                        numbers = torch.randn(shape, generator=generator) * 0.05
                        tensors[f"{name}.{path}.{half}.weight"] = numbers.half()
        save_file(tensors, folder / f"lora-{number}.safetensors")


def by_diffusers(folder: Path, requests: "Sequence[GenerationRequest]", threads: int) -> Callable[[], None]:
    """diffusers' pipeline with all of them loaded, one request at a time with its own set."""
    from bench.pipeline import embedded

    pipeline = embedded(threads)
    inner: Any = pipeline._pipeline
    for request in requests:
        name = request.adapters[0].name
        inner.load_lora_weights(folder / f"{name}.safetensors", adapter_name=name)

    def draw() -> None:
        for request in requests:
            inner.set_adapters([request.adapters[0].name])
            pipeline.draw([request])

    return draw


if __name__ == "__main__":
    typer.run(main)
