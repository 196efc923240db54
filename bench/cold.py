"""Cold start of one model: seconds from the start of a process to its first picture, and until it is compiled."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench import assembled
from bench.built import Built
from bench.load import Say
from bench.pages import Keep, Piece
from bench.report import NOTHING, Sheet, figure

STAGES = ("imported", "loaded", "warm", "drawn", "compiled")
LEGEND = (
    "Seconds from the start of a fresh process until its modules are imported, the weights are loaded (a diffusers "
    "folder of safetensors in the page cache), the warm-up is over (a picture of two steps, and the measuring of "
    "forwards), the first picture of 20 steps is drawn, and a picture is drawn by the compiled network, which is "
    "compiled beside the drawing. Again: with what the first start measured and compiled."
)


@dataclass(kw_only=True)
class Start:
    """One start. Seconds by stage."""

    title: str
    seconds: dict[str, float] = field(default_factory=dict)


def starts(built: Built, say: Say, keep: Keep) -> None:
    """With nothing kept, and once more with what the first start has kept."""
    found: list[Start] = []
    with tempfile.TemporaryDirectory(prefix="heliograph-cold-") as folder:
        weights, kept = Path(folder) / "weights", Path(folder) / "kept"
        say("cold: writing the weights", 0, 1)
        assembled.write(built.network, built.modules, weights)
        for file in weights.glob("*/*.safetensors"):
            _read(file)
        for title in ("cold", "again"):
            say(f"{title}: a fresh process", 0, 1)
            found.append(_start(built, title, weights, kept))
            keep(Piece.of("cold", built, [_sheet(built, found)], [LEGEND], found))


def _read(file: Path) -> None:
    """So that it is in the page cache for sure."""
    with file.open("rb") as stream:
        while stream.read(2**26):
            pass


def _start(built: Built, title: str, weights: Path, kept: Path) -> Start:
    """Raises CalledProcessError where the process fails."""
    options = built.options
    command = [
        *(sys.executable, "-m", "bench.first", "--model", built.network.name, "--source", str(weights)),
        *("--side", str(built.side), "--device", options.device, "--dtype", options.dtype),
        *("--measured", str(kept / "measured")),
        *(["--graphs"] if options.graphs else []),
        *(["--compiled", str(kept / "compiled")] if options.compiled is not None else []),
    ]
    start, began = Start(title=title), time.perf_counter()
    project = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=project) as process:
        assert process.stdout is not None, "it was asked for"
        for line in process.stdout:
            if line.strip() in STAGES:
                start.seconds[line.strip()] = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return start


def _sheet(built: Built, found: list[Start]) -> Sheet:
    name = built.network.name
    rows = [[one.title, *(_told(one, stage) for stage in STAGES)] for one in found]
    if len(found) == 2:
        cold, again = (one.seconds for one in found)
        both = {stage: figure(again[stage] / cold[stage]) for stage in cold if stage in again}
        rows.append(["again / cold", *(both.get(stage, NOTHING) for stage in STAGES)])
    return Sheet(title=f"{name} at {built.side} px, starting, seconds", columns=(name, *STAGES), rows=rows)


def _told(start: Start, stage: str) -> str:
    return figure(start.seconds[stage], 1) if stage in start.seconds else NOTHING
