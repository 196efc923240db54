"""The GPU benchmark's own honesty, on small networks and a CPU: every part's figures are there and can be."""

import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers.models.attention_processor import Attention
from rich.console import Console

from bench import built as built_module
from bench import capacity, gpu, ladder, lora_share, turns
from bench.budget import Budget
from bench.built import Built, Options
from bench.cold import starts
from bench.contender import Work
from bench.fullsize import NETWORKS, TOKENS
from bench.inprocess import InProcess
from bench.load import Load, Outcome, Run, drive
from bench.openloop import searched
from bench.pages import Findings, Piece, page
from bench.report import Sheet
from bench.settled import breadths
from bench.workloads import RequestClass, Workload, request_of
from models import measuring
from models.embedded import architecture

OPTIONS = Options(
    device="cpu",
    dtype="auto",
    tiny=True,
    pictures=4,
    groups=(2,),
    compile_mode=None,
    graphs=False,
    compiled=None,
    workloads=("equal", "steps"),
    requests=4,
    refinements=0,
    minutes=None,
    seed=1,
)


def few_steps(side: int, other: int) -> tuple[Workload, ...]:
    return (
        Workload(name="equal", title="equal requests", shares={RequestClass(side, 3): 100}),
        Workload(name="steps", title="mixed steps", shares={RequestClass(side, 2): 50, RequestClass(side, 4): 50}),
        Workload(name="sizes", title="mixed sizes", shares={RequestClass(side, 2): 50, RequestClass(other, 2): 50}),
    )


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, few breadths to measure a cap from, few trials."""
    for module in (built_module, ladder):
        monkeypatch.setattr(module, "workloads_at", few_steps)
    for module in (built_module, ladder, lora_share, turns):
        monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(measuring, "_ROW_COUNTS", (1, 2, 4))
    monkeypatch.setattr(capacity, "MOST_TRIALS", 2)


def figures_of(parts: list[gpu.Parts], folder: Path, **options: Any) -> dict[str, Any]:
    """What a run writes, by part."""
    gpu.measure([NETWORKS["sd15"]], parts, replace(OPTIONS, **options), folder, Console(file=io.StringIO()))
    told = json.loads((folder / "gpu.json").read_text())
    assert page([Findings.read(folder / "gpu.json")]) + "\n" == (folder / "gpu.md").read_text()
    figures = {piece["part"]: piece["figures"] for piece in told["pieces"]}
    assert list(figures) == parts
    return figures


@pytest.mark.usefixtures("_short")
def test_everyone_is_saturated_and_stands_arrivals(tmp_path: Path):
    found = figures_of([gpu.Parts.SATURATED, gpu.Parts.OPEN], tmp_path, workloads=("equal", "sizes"))
    assert [turn["contender"] for turn in found["saturated"]] == ["B0", "E1", "E"]
    for turn in found["saturated"]:
        assert turn["drift"] < 1e-4
        assert turn["saturated"]["equal"]["pictures_per_s"] > 0
        assert 0 <= turn["saturated"]["equal"]["padded_share"] < 1
    assert found["saturated"][2]["saturated"]["equal"]["rows_per_forward"] > 2

    assert [each["workload"] for each in found["open"]["workloads"]] == ["equal", "sizes"]
    for each in found["open"]["workloads"]:
        assert min(each["computed"].values()) > 0
        assert each["capacities"]["E"]["rate"] > 0
        assert each["tails"].keys() == {"B1", "E"}
        assert not each["cut"]


@pytest.mark.usefixtures("_short")
def test_loras_have_a_share_and_the_ladder_all_its_rungs(tmp_path: Path):
    found = figures_of([gpu.Parts.LORAS, gpu.Parts.LADDER], tmp_path, workloads=("equal",))
    assert len(found["loras"]) == 3
    assert all(way["share"] > 0 for way in found["loras"])

    assert [rung["name"] for rung in found["ladder"]] == [rung.name for rung in ladder.RUNGS]
    missing = {rung["name"] for rung in found["ladder"] if rung["missing"]}
    assert missing == {"graphs", "compiled", "FP8, not compiled"}  # which a CPU cannot, or no folder was given for
    assert all(rung["gain"] for rung in found["ladder"][1:] if rung["name"] not in missing)


@pytest.mark.usefixtures("_short")
def test_torchs_kernels_for_attention_are_timed_at_a_models_own_shapes(tmp_path: Path):
    found = figures_of([gpu.Parts.ATTENTION], tmp_path)["attention"]
    unet: Any = architecture.unet(architecture.FAMILIES["sd15"])
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    assert sum(shape["times"] for shape in found["shapes"]) == len(layers)
    assert {shape["told"] for shape in found["shapes"]} > {TOKENS}
    by_name = {kernel["name"]: kernel for kernel in found["kernels"]}
    assert min(by_name["torch's own choice"]["seconds"].values()) > 0
    assert by_name["cuDNN"]["missing"]
    assert not by_name["cuDNN"]["seconds"]


def test_a_part_that_fails_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def failing(*given: object) -> None:
        raise RuntimeError("no room")

    async def telling(built: Built, say: object, keep: Any) -> None:
        keep(Piece.of("ladder", built, [], ["It was there."], None))

    monkeypatch.setattr(lora_share, "compare", failing)
    monkeypatch.setattr(ladder, "climb", telling)
    parts = [gpu.Parts.LORAS, gpu.Parts.LADDER]
    gpu.measure([NETWORKS["sd15"]], parts, OPTIONS, tmp_path, Console(file=io.StringIO()))
    text = (tmp_path / "gpu.md").read_text()
    assert "sd15, loras: failed, RuntimeError('no room')." in text
    assert "It was there." in text


class Package:
    """A stand-in that is there at once, and lets the network answer itself."""

    failed = False

    def ready(self) -> bool:
        return True


class Compiled:
    """A stand-in that has compiled everything at once."""

    def __init__(self, network: object, cache: Path):
        pass

    def package(self, call: Callable[[], object]) -> Package:
        return Package()

    @staticmethod
    def used(package: Package) -> Any:
        return nullcontext()


@pytest.mark.usefixtures("_short")
async def test_an_engine_is_measured_when_all_that_may_come_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("models.denoiser.Compiled", Compiled)
    built = Built(NETWORKS["sd15"], replace(OPTIONS, compiled=tmp_path, pictures=5))
    built.settle()
    async with InProcess(lambda: built.engine(12)) as engine:
        kinds = engine.compiled_kinds
        assert kinds == 1  # without graphs, of any number of rows
        requests = [built.request_of(RequestClass(built.side, 4), seed) for seed in range(5)]
        run = await drive(engine, Load.saturating(requests))
        assert engine.compiled_kinds == kinds
    assert run.work is not None
    assert run.work.padded_share == 0
    built.close()


def test_a_fresh_process_tells_when_it_gets_where(tmp_path: Path):
    built = Built(NETWORKS["sd15"], OPTIONS)
    built.settle()
    pieces: list[Piece] = []
    starts(built, lambda what, done, of: None, pieces.append)
    assert [start["title"] for start in pieces[-1].figures] == ["cold", "again"]
    for start in pieces[-1].figures:
        assert list(start["seconds"]) == ["imported", "loaded", "warm", "drawn"]
        assert 0 < start["seconds"]["imported"] < start["seconds"]["loaded"] < start["seconds"]["drawn"]


def test_breadths_are_one_for_each_size_that_rows_are_rounded_up_to():
    assert breadths(1) == [1]
    assert breadths(8) == [1, 2, 3, 4, 6, 8]
    assert breadths(5) == [1, 2, 3, 4, 5]


def test_what_a_portion_leaves_over_goes_to_the_others():
    now = 0.0
    budget = Budget(1.0, 4, lambda: now)
    first = budget.take(2)
    assert first.has(30.0)
    assert not first.has(31.0)
    now = 10.0
    assert budget.take(1).has(25.0)
    assert not first.has(21.0)
    assert Budget(None, 2).take(1).has(1e9)


async def test_a_search_without_time_gives_the_best_that_passed():
    outcome = Outcome(
        request=request_of(RequestClass(64, 2), 1), arrival_s=0.0, finished_s=1.0, limit_s=1.0, picture=b""
    )

    async def passes(rate: float) -> Run:
        return Run(outcomes=(outcome,), planned=1, work=Work())

    found = await searched(passes, 1.0, 1, fits=lambda rate: rate < 1.5)
    assert found.rate == pytest.approx(1.25)
    assert found.cut
    assert found.note == "no time for a trial at 1.56 a second"
    assert len(found.trials) == 2


def test_a_piece_takes_the_place_of_itself_and_legends_are_said_once(tmp_path: Path):
    def piece(part: str, figure: str) -> Piece:
        table = Sheet(title=part, columns=("", "a"), rows=[["b", figure]])
        return Piece(part=part, model="sd15", tables=[table], notes=["The legend."], figures={"a": figure})

    found = Findings(facts=["A fact."], options={"out": tmp_path})
    for each in (piece("one", "1"), piece("two", "2"), piece("one", "3")):
        found.put(each)
        found.write(tmp_path)
    assert [each.figures["a"] for each in found.pieces] == ["3", "2"]
    text = page([found, Findings.read(tmp_path / "gpu.json")])
    assert text.count("The legend.") == text.count("A fact.") == text.count("**two**") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}
