"""`python -m bench.gpu`: full-size networks with random weights, the engine against diffusers, without ray.

Measures the device's own ceilings first, and tells what each contender reaches as a share of them.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bench.progress import telling

if TYPE_CHECKING:
    from bench.built import Built, Options
    from bench.ceilings import Ceilings
    from bench.fullsize import Network
    from bench.load import Say
    from bench.pages import Findings, Keep, Piece
    from bench.turns import Turns


class Names(StrEnum):
    """The models."""

    SD15 = "sd15"
    SD21 = "sd21"
    SDXL = "sdxl"


class Parts(StrEnum):
    """What is measured, in this order."""

    SATURATED = "saturated"
    OPEN = "open"
    LORAS = "loras"
    ATTENTION = "attention"
    LADDER = "ladder"
    COLD = "cold"


class Workloads(StrEnum):
    """Of `saturated` the first two, of `open` all."""

    EQUAL = "equal"
    STEPS = "steps"
    SIZES = "sizes"


class Modes(StrEnum):
    """torch.compile's modes, and `none` for no compiled contenders of diffusers'."""

    NONE = "none"
    DEFAULT = "default"
    REDUCE = "reduce-overhead"
    MAX = "max-autotune"


def main(
    model: Annotated[list[Names] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    part: Annotated[list[Parts] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    workload: Annotated[list[Workloads] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu together with --tiny.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 on cuda, float32 on cpu.")] = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="Small networks, to see that it works.")] = False,
    pictures: Annotated[int, typer.Option(help="Of each saturated run; a quarter, one at a time.", min=2)] = 64,
    group: Annotated[list[int] | None, typer.Option(help="A size of B1c's batches; may be repeated.", min=2)] = None,
    compile_mode: Annotated[Modes, typer.Option("--compile", help="How B0c and B1c are compiled.")] = Modes.REDUCE,
    graphs: Annotated[
        bool | None, typer.Option("--graphs/--no-graphs", help="Heliograph's forwards as graphs; on cuda unless said.")
    ] = None,
    compiled: Annotated[
        Path | None, typer.Option(help="Heliograph's network compiled too, and kept in this folder.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Of each open-loop trial.", min=1)] = 60,
    refinements: Annotated[int, typer.Option(help="Of a capacity: 0 is exact to a quarter, 1 to 12 %.", min=0)] = 1,
    minutes: Annotated[float | None, typer.Option(help="For the open-loop trials of one model; no bound.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the requests, their order and arrivals.")] = 1,
    found: Annotated[
        list[Path] | None, typer.Option(help="Measure nothing, but take what this gpu.json has; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for gpu.json and gpu.md.")] = Path("out/bench"),
    publish: Annotated[bool, typer.Option("--publish", help="Also put the tables into bench/README.md.")] = False,
) -> None:
    """Measure the engine on full-size SD 1.5, SD 2.1 and SDXL with random weights: speed is real, pictures are not."""
    for package in ("TRANSFORMERS", "DIFFUSERS"):  # they talk of optional packages and of casts that are meant
        os.environ.setdefault(f"{package}_VERBOSITY", "error")
    from bench import readme
    from bench.built import Options
    from bench.fullsize import NETWORKS
    from bench.pages import Findings, page

    options = Options(
        device=device,
        dtype=dtype,
        tiny=tiny,
        pictures=pictures,
        groups=tuple(group or (2, 4, 8)),
        compile_mode=None if compile_mode is Modes.NONE else compile_mode.value,
        graphs=device == "cuda" if graphs is None else graphs,
        compiled=compiled and compiled.absolute(),
        workloads=tuple(workload or Workloads),
        requests=requests,
        refinements=refinements,
        minutes=minutes,
        seed=seed,
    )
    if found:
        runs = [Findings.read(file) for file in found]
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.md").write_text(page(runs) + "\n")
    else:
        networks = [NETWORKS[name] for name in model or Names]
        runs = [measure(networks, part or list(Parts), options, out, Console())]
    if publish:
        readme.publish("gpu", page(runs))


def measure(
    networks: "Sequence[Network]", parts: Sequence[Parts], options: "Options", out: Path, console: Console
) -> "Findings":
    """All parts with every model, each written when it is there, and again with more in it."""
    from bench import device
    from bench.ceilings import Ceilings
    from bench.machine import Machine
    from bench.pages import Findings
    from bench.pipeline import hide_progress
    from models.weights import place

    hide_progress()

    placement = place(options.device, options.dtype)
    ceilings = Ceilings.measure(placement.device, placement.dtype)
    before = device.clocks()
    facts = [
        f"Device: {device.name(placement.device)}; {Machine.here(os.cpu_count() or 1)}.",
        f"Command: `{' '.join(['python -m bench.gpu', *sys.argv[1:]])}`.",
        _ceilings_note(ceilings),
    ]
    told = Findings(facts=facts, options=asdict(options) | {"ceilings": asdict(ceilings)})
    console.print(*facts, sep="\n", highlight=False)
    with telling(console) as say:

        def keep(piece: "Piece") -> None:
            told.put(piece)
            if clocks := device.clocks():
                told.facts = [*facts, f"Clocks, power and temperature before: {before}; after: {clocks}."]
            told.write(out)

        for network in networks:
            asyncio.run(_measure_model(network, parts, options, ceilings, say, keep))
    for piece in told.pieces:
        console.print(*(table.rich() for table in piece.tables), *piece.notes, sep="\n", highlight=False)
    return told


async def _measure_model(
    network: "Network",
    parts: Sequence[Parts],
    options: "Options",
    ceilings: "Ceilings",
    say: "Say",
    keep: "Keep",
) -> None:
    """B0 draws before the weights are laid out for the others."""
    from bench.built import Built
    from bench.pages import Piece
    from bench.turns import Turns, time_alone

    say(f"{network.name}: building", 0, 1)
    built = Built(network, options)
    turns = Turns(built, ceilings, built.reference(), say, keep) if Parts.SATURATED in parts else None
    built.settle()
    if turns is not None:
        await turns.first()
    if Parts.OPEN in parts:
        await time_alone(built, say)
    built.lay_out()
    for part in (each for each in Parts if each in parts):
        say(f"{network.name}, {part}: starting", 0, 1)
        try:
            await _take(part, built, turns, say, keep)
        except Exception as fault:  # whatever it is: the other parts are worth having
            keep(Piece.of(f"{part}, failed", built, [], [f"{network.name}, {part}: failed, {fault!r}."], None))
    built.close()


async def _take(part: Parts, built: "Built", turns: "Turns | None", say: "Say", keep: "Keep") -> None:
    from bench import attention, cold, ladder, lora_share
    from bench.capacities import Capacities

    match part:
        case Parts.SATURATED:
            assert turns is not None, "B0 has had its turn"
            await turns.others()
        case Parts.OPEN:
            await Capacities(built, say, keep).run()
        case Parts.LORAS:
            await lora_share.compare(built, say, keep)
        case Parts.ATTENTION:
            attention.compare(built, say, keep)
        case Parts.LADDER:
            await ladder.climb(built, say, keep)
        case Parts.COLD:
            built.free()
            cold.starts(built, say, keep)


def _ceilings_note(ceilings: "Ceilings") -> str:
    return (
        f"Ceilings: {ceilings.flop_per_s / 1e12:.3g} TFLOP/s in a product of {ceilings.cube}-cubes ({ceilings.dtype}), "
        f"{ceilings.bytes_per_s / 1e9:.3g} GB/s copied."
    )


if __name__ == "__main__":
    typer.run(main)
