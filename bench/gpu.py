"""`python -m bench.gpu`: full-size networks with random weights, the engine against diffusers, without ray.

Measures the device's own ceilings first, and tells what each contender reaches as a share of them.
"""

import asyncio
import json
import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from bench.ceilings import Ceilings
    from bench.fullsize import Network
    from bench.report import Sheet
    from bench.turns import Options, Turn


class Names(StrEnum):
    """The models."""

    SD15 = "sd15"
    SD21 = "sd21"
    SDXL = "sdxl"


class Modes(StrEnum):
    """torch.compile's modes, and `none` for no compiled contenders."""

    NONE = "none"
    DEFAULT = "default"
    REDUCE = "reduce-overhead"
    MAX = "max-autotune"


def main(
    model: Annotated[list[Names] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu together with --tiny.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 on cuda, float32 on cpu.")] = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="Small networks, to see that it works.")] = False,
    pictures: Annotated[int, typer.Option(help="Of each saturated run.")] = 64,
    group: Annotated[int, typer.Option(help="Pictures in a batch of B1c.")] = 8,
    compile_mode: Annotated[Modes, typer.Option("--compile", help="How B0c and B1c are compiled.")] = Modes.REDUCE,
    seed: Annotated[int, typer.Option(help="Of the weights, the requests and their order.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for gpu.json and gpu.md.")] = Path("out/bench"),
) -> None:
    """Measure the engine on full-size SD 1.5, SD 2.1 and SDXL with random weights: speed is real, pictures are not."""
    for package in ("TRANSFORMERS", "DIFFUSERS"):  # they talk of optional packages and of casts that are meant
        os.environ.setdefault(f"{package}_VERBOSITY", "error")
    from bench.fullsize import NETWORKS
    from bench.turns import Options

    options = Options(
        device=device,
        dtype=dtype,
        tiny=tiny,
        pictures=pictures,
        group=group,
        compile_mode=None if compile_mode is Modes.NONE else compile_mode.value,
        seed=seed,
    )
    console = Console()
    found = measure([NETWORKS[name] for name in model or list(Names)], options, console)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(found["facts"], indent=1) + "\n")
    (out / "gpu.md").write_text("\n\n".join([*found["tables"], *found["notes"]]) + "\n")


def measure(networks: "list[Network]", options: "Options", console: Console) -> dict[str, Any]:
    """Runs everything, printing each table as it is complete."""
    from bench.ceilings import Ceilings
    from bench.machine import Machine
    from bench.turns import Turns
    from models.weights import place

    placement = place(options.device, options.dtype)
    ceilings = Ceilings.measure(placement.device, placement.dtype)
    notes = [
        f"Machine: {_device_name(options.device)}; {Machine.here(os.cpu_count() or 1)}.",
        f"Command: `{' '.join(['python -m bench.gpu', *sys.argv[1:]])}`.",
        _ceilings_note(ceilings),
        "Random weights. Equal: 20 steps; of peak: arithmetic done, as a share of the measured product; mixed: "
        "20/30/50 steps at 50/30/20 %; drift: relative L2 distance of the final latents from float32's; first: seconds "
        "to the first picture with the networks in memory, warm-up and compiling included.",
    ]
    for note in notes:
        console.print(note, highlight=False)
    tables, facts = [], {"ceilings": asdict(ceilings), "options": asdict(options), "models": {}}
    for network in networks:
        turns: list[Turn] = []
        with console.status(f"{network.name}: building") as status:

            def report(turn: "Turn", name: str = network.name, turns: "list[Turn]" = turns) -> None:
                turns.append(turn)
                status.update(f"{name}: {turn.contender} done")

            asyncio.run(Turns(network, options, ceilings).run(report))
        sheet = _sheet(network.name, options.side(network), turns)
        console.print(sheet.rich())
        tables.append(sheet.markdown())
        facts["models"][network.name] = [asdict(turn) for turn in turns]
        legend = ", ".join(f"{turn.contender}: {turn.title}" for turn in turns) + "."
        if legend not in notes:
            notes.append(legend)
            console.print(legend, highlight=False)
    return {"facts": facts, "tables": tables, "notes": notes}


def _device_name(device: str) -> str:
    import torch

    if device != "cuda":
        return "no GPU, which says nothing about GPUs"
    facts = torch.cuda.get_device_properties(0)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _ceilings_note(ceilings: "Ceilings") -> str:
    return (
        f"Ceilings: {ceilings.flop_per_s / 1e12:.3g} TFLOP/s in a product of {ceilings.cube}-cubes ({ceilings.dtype}), "
        f"{ceilings.bytes_per_s / 1e9:.3g} GB/s copied."
    )


def _sheet(name: str, side: int, turns: "list[Turn]") -> "Sheet":
    from bench.report import Sheet

    return Sheet(
        title=f"{name} at {side} px, pictures a second",
        columns=(name, "equal", "of B0", "of peak", "rows", "mixed", "rows", "GiB", "drift", "first"),
        rows=[_row(turn, turns[0]) for turn in turns],
    )


def _row(turn: "Turn", baseline: "Turn") -> list[str]:
    equal, mixed = turn.saturated["equal"], turn.saturated["steps"]
    return [
        turn.contender,
        f"{equal.pictures_per_s:.3g}",
        f"{equal.pictures_per_s / baseline.saturated['equal'].pictures_per_s:.2f}",
        f"{turn.peak_share:.0%}",
        f"{equal.rows_per_forward:.1f}",
        f"{mixed.pictures_per_s:.3g}",
        f"{mixed.rows_per_forward:.1f}",
        f"{turn.memory_gib:.1f}",
        f"{turn.drift:.1e}",
        f"{turn.first_picture_s:.1f}",
    ]


if __name__ == "__main__":
    typer.run(main)
