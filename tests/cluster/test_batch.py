"""A batch job on a real Ray, killed once and taken up again; and what an actor does with rows, without Ray."""

import hashlib
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from app import deployment
from app.replica import start_engine
from app.settings import FetchSettings, ModelSettings
from bench.serving import PROJECT
from cluster.actor import Actor, Work
from cluster.batch import CALLS, STILL_S, Batch, Pool, Stopped, batch
from cluster.beginnings import ALONE, BEGUN, TOGETHER, Beginnings
from cluster.drawing import Drawer
from cluster.inputs import Pictures
from cluster.manifest import SCHEMA, Manifest
from cluster.place import Place
from cluster.progress import Telling
from cluster.table import Row, rows
from models.errors import GenerationFailed, InvalidRequest
from models.events import Event, Failed, Finished
from models.images import Picture, encode
from models.request import EffectiveRequest, GenerationRequest
from tests.acceptance.conftest import ENVIRONMENT
from tests.app.stores.conftest import BUCKET, CREDENTIALS

SMALL: dict[str, Any] = {"prompt": "a red circle", "steps": 1, "width": 64, "height": 64}
BLOCK = 2
KILLED_AFTER = 3  # parts
TIMEOUT_S = 180


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """The embedded sd15, as the shipped configuration has it, less the measuring."""
    described, _ = deployment.read(PROJECT / "serve_config.yaml")
    model = described.catalogue.models[0].model_copy(update={"threads": 1})
    engine, _ = start_engine(model, warm_up=False)
    yield engine
    engine.close()


def prompts(count: int) -> list[dict[str, Any]]:
    """Rows of several sizes and numbers of steps, one without a seed, one with several pictures."""
    lines: list[dict[str, Any]] = [
        {
            "id": f"row-{number}",
            "prompt": f"a {('red', 'green', 'blue')[number % 3]} circle",
            "steps": 2 + number % 3,
            "width": (64, 96, 128)[number % 3],
            "height": 64,
            "seed": number,
        }
        for number in range(count)
    ]
    del lines[1]["seed"], lines[1]["id"]
    lines[2]["samples"] = 2
    return lines


def drawn(engine: Any, place: Place, folder: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The whole manifest of rows, drawn as one block."""
    drawer = Drawer(engine, Pictures(folder, FetchSettings(pictures=False)), place)
    drawer.draw(read(folder, lines))
    Manifest(place).finish()
    (folder / "manifest.parquet").write_bytes(place.get("manifest.parquet") or b"")
    return pq.read_table(folder / "manifest.parquet").to_pylist()


def read(folder: Path, lines: list[dict[str, Any]]) -> list[Row]:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return list(rows(folder / "rows.jsonl"))


def check(record: dict[str, Any], data: bytes, expected: bytes) -> None:
    """The picture is the one of the engine alone: within 1 of 255, as neighbours in a batch may have it."""
    ours, theirs = (Picture.from_bytes(one).array().astype(np.int16) for one in (data, expected))
    assert np.abs(ours - theirs).max() <= 1
    assert (record["width"], record["height"]) == (ours.shape[1], ours.shape[0])


@pytest.mark.parametrize("kind", ["folder", "moto"])
def test_a_block_of_rows_becomes_pictures_and_records(
    engine: Any, kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    place = Place(str(tmp_path / "output"))
    if kind == "moto":
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(f"AWS_{name.upper()}", value)
        place = Place(f"s3://{BUCKET}/{uuid.uuid4().hex}", request.getfixturevalue(kind), "us-east-1")
    (tmp_path / "white.png").write_bytes(encode(np.full((64, 64, 3), 255, np.uint8), "png"))
    records = drawn(
        engine,
        place,
        tmp_path,
        [
            {"id": "jpeg", "prompt": "a red circle", "steps": 2, "seed": 7, "output_format": "jpg", "samples": 2},
            {"id": "bad", "prompt": "a red circle", "steps": 0},
            {"id": "image", "prompt": "a blue star", "steps": 2, "seed": 7, "image": "white.png"},
            {"id": "outside", "prompt": "a blue star", "image": "../secret.png"},
            {"id": "address", "prompt": "a blue star", "image": "https://example.org/a.png"},
            {"id": "other", "prompt": "a star", "model": "sdxl"},
            {"id": "larger", "prompt": "a star", "upscale": {"scale": 2}},
        ],
    )
    assert [(r["id"], r["index"], r["path"]) for r in records[:4]] == [
        ("jpeg", 0, "images/jpeg-0.jpg"),
        ("jpeg", 1, "images/jpeg-1.jpg"),
        ("bad", 0, None),
        ("image", 0, "images/image-0.png"),
    ]
    errors = {r["id"]: json.loads(r["error"]) for r in records if r["error"]}
    fields = {id: error.get("field") for id, error in errors.items()}
    assert fields == {"bad": "steps", "outside": "image", "address": "image", "other": None, "larger": "upscale"}
    assert errors["other"]["code"] == "not_found"
    assert (records[1]["seed"], records[0]["format"], json.loads(records[0]["parameters"])["steps"]) == (8, "jpeg", 2)
    assert json.loads(records[3]["parameters"])["image"] == {"width": 64, "height": 64}
    assert set(json.loads(records[0]["timings"])) == {"queued", "encode", "denoise", "decode"}
    data = place.get("images/image-0.png") or b""
    assert hashlib.sha256(data).hexdigest() == records[3]["sha256"]
    white = Picture.from_bytes((tmp_path / "white.png").read_bytes())
    alone = GenerationRequest(model="sd15", prompt="a blue star", steps=2, seed=7, image=white)
    check(records[3], data, engine.generate([alone])[0][0].data)


def test_what_is_left_to_chance_is_the_same_each_time(engine: Any, tmp_path: Path):
    line = SMALL | {"variation_strength": 0.5}
    both = [drawn(engine, Place(str(tmp_path / name)), tmp_path, [line])[0] for name in ("one", "two")]
    parameters = [json.loads(record["parameters"]) for record in both]
    assert parameters[0] == parameters[1]
    assert parameters[0]["variation_seed"] != parameters[0]["seed"] == both[0]["seed"]
    assert both[0]["sha256"] == both[1]["sha256"]


def test_a_block_that_is_sent_again_is_not_drawn_again(engine: Any, tmp_path: Path):
    drawer = Drawer(engine, Pictures(tmp_path, FetchSettings()), Place(str(tmp_path / "output")))
    block = read(tmp_path, [SMALL])
    assert len(drawer.draw(block)) == 1
    forwards = engine.load().forwards
    assert drawer.draw(block) == []
    assert engine.load().forwards == forwards


def test_rows_beside_those_of_an_earlier_runs_part_are_drawn(tmp_path: Path):
    """A run with larger blocks, begun before the actors of the one before it had died."""
    place = Place(str(tmp_path / "output"))
    drawer = Drawer(cast(Any, None), Pictures(tmp_path, FetchSettings()), place)
    block = read(tmp_path, [{"promt": "which no row needs an engine for"}] * 4)
    drawer.draw(block[:1])
    drawer.draw(block[1:2])
    assert [record["number"] for record in drawer.draw(block)] == [2, 3]
    assert Manifest(place).finish(range(4)) == set()


class Overwritten(Batch):
    """A job whose only part is written over by that of another run."""

    def _draw(self, missing: list[dict[str, Any]], telling: Telling) -> None:
        Manifest(self.work.place()).add(0, [dict.fromkeys(SCHEMA.names) | {"number": 0, "index": 0}])


def test_a_job_that_lacks_rows_is_not_done(tmp_path: Path):
    read(tmp_path, [SMALL, SMALL])
    described, _ = deployment.read(PROJECT / "serve_config.yaml")
    output = str(tmp_path / "output")
    work = Work(model=described.catalogue.models[0], folder=tmp_path, fetch=FetchSettings(), output=output)
    with pytest.raises(Stopped, match="1 rows"):
        Overwritten(input=tmp_path / "rows.jsonl", work=work, pool=Pool()).run()
    assert not Manifest(Place(output)).whole


def test_blocks_that_are_told_of_together_have_the_time_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else a job of a million rows would end while its first tasks are still drawing."""
    context, sizes = SimpleNamespace(), list[int]()
    monkeypatch.setattr("ray.data.DataContext", SimpleNamespace(get_current=lambda: context))
    monkeypatch.setattr("cluster.batch.MOST_TASKS", 2)

    def handed_out(tables: list[Any]) -> None:
        sizes.extend(len(table) for table in tables)
        raise Stopped

    monkeypatch.setattr("ray.data.from_arrow", handed_out)
    work = Work(model=cast(Any, None), folder=tmp_path, fetch=FetchSettings(), output=str(tmp_path))
    missing = [row.columns() for row in read(tmp_path, [SMALL] * 11)]
    with pytest.raises(Stopped):
        list(Batch(input=tmp_path, work=work, pool=Pool(block=2))._told(missing))
    assert sizes == [6, 5]
    assert context.execution_no_progress_timeout_s == 3 * STILL_S


@pytest.mark.parametrize("option", ["--num-cpus", "--max-actors"])
def test_nothing_is_not_taken_for_what_is_left_out(tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Batch, "run", lambda self: (0, 0))
    read(tmp_path, [SMALL])
    options = ["--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "output")]
    app = typer.Typer()
    app.command()(batch)
    told = CliRunner().invoke(app, [*options, "--config", str(PROJECT / "serve_config.yaml"), option, "0"])
    assert isinstance(told.exception, InvalidRequest)


class Faulty:
    """The engine, but its first answers are failures."""

    def __init__(self, engine: Any, *errors: GenerationFailed):
        self._engine, self._errors, self.card, self.begun = engine, list(errors), engine.card, 0

    def submit(self, request: EffectiveRequest, on_event: Callable[[Event], None], *, progress: bool) -> None:
        self.begun += 1
        if self._errors:
            on_event(Failed(error=self._errors.pop(0)))
        else:
            self._engine.submit(request, on_event, progress=progress)

    def healthy(self) -> str | None:
        return self._engine.healthy()


def test_a_failure_that_may_mend_itself_is_tried_once_more(engine: Any, tmp_path: Path):
    memory, nothing = GenerationFailed("out_of_memory"), GenerationFailed("nan_latents")
    faulty = Faulty(engine, memory, nothing, memory, memory)  # a, b and c; then a again
    records = drawn(faulty, Place(str(tmp_path / "output")), tmp_path, [SMALL | {"id": id} for id in ("a", "b", "c")])
    assert [r["error"] and json.loads(r["error"])["code"] for r in records] == ["out_of_memory", "nan_latents", None]
    assert faulty.begun == 5


class Ended(BaseException):
    """Of a process, as it looks to whoever is in it."""


class Mortal(Faulty):
    """The engine, but it dies of a prompt."""

    def submit(self, request: EffectiveRequest, on_event: Callable[[Event], None], *, progress: bool) -> None:
        if request.prompt == "hemlock":
            raise Ended
        super().submit(request, on_event, progress=progress)


def test_a_row_that_ends_its_process_each_time_ends_only_itself(engine: Any, tmp_path: Path):
    place = Place(str(tmp_path / "output"))
    block = read(tmp_path, [SMALL | {"id": id, "prompt": prompt} for id, prompt in enumerate(("a", "hemlock", "b"))])
    for _ in range(TOGETHER + ALONE):
        with pytest.raises(Ended):
            Drawer(Mortal(engine), Pictures(tmp_path, FetchSettings()), place).draw(block)
    records = Drawer(Mortal(engine), Pictures(tmp_path, FetchSettings()), place).draw(block)
    assert [record["error"] and json.loads(record["error"])["code"] for record in records] == ["poisoned", None]
    assert [record["number"] for record in records] == [
        1,
        2,
    ]  # the first was drawn alone before, and stands in its part
    assert Manifest(place).recorded() == {0, 1, 2}
    assert place.names(BEGUN) == []


def test_blocks_of_one_process_are_not_blamed_for_each_others_rows(engine: Any, tmp_path: Path):
    """Two blocks in two threads; the process ends with a row of the first, and takes the second one's beginning too."""
    place = Place(str(tmp_path / "output"))
    prompts = ("c", "hemlock", "a", "b")
    rows = read(tmp_path, [SMALL | {"id": id, "prompt": prompt} for id, prompt in enumerate(prompts)])
    blocks = [rows[:2], rows[2:]]
    for _ in range(TOGETHER):
        for block in blocks:
            Beginnings(place).together(block[0].number)
    together, most = [0], [0]

    class Watched(Mortal):
        """One that notes how many rows it has at a time."""

        def submit(self, request: EffectiveRequest, on_event: Callable[[Event], None], *, progress: bool) -> None:
            def told(event: Event) -> None:
                together[0] -= isinstance(event, Finished | Failed)
                on_event(event)

            together[0] += request.prompt != "hemlock"
            most[0] = max(most[0], together[0])
            super().submit(request, told, progress=progress)

    for _ in range(ALONE + 1):  # each time a new process
        drawer = Drawer(Watched(engine), Pictures(tmp_path, FetchSettings()), place)
        with ThreadPoolExecutor(2) as threads:
            ends = [threads.submit(drawer.draw, block) for block in blocks]
        assert ends[1].exception() is None
    assert most == [1]
    assert [record["error"] and json.loads(record["error"])["code"] for record in ends[0].result()] == ["poisoned"]
    assert Manifest(place).recorded() == {0, 1, 2, 3}
    assert len(place.names("images")) == 3


def test_an_actor_takes_on_more_than_a_server_would_let_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of slow models the rows of a few blocks are more than `max_wait_s` allows, and there is nobody to ask again."""
    model = ModelSettings(name="sd15", source=str(PROJECT / "models/embedded/sd15"), max_rows=8, max_wait_s=0.01)
    work = Work(model=model, folder=tmp_path, fetch=FetchSettings(), output=str(tmp_path / "output"))
    rows = read(tmp_path, [SMALL | {"steps": 3}] * 6)
    told = Actor(work)(pa.Table.from_pylist([row.columns() for row in rows]))
    assert told.to_pydict() == {"rows": [6], "pictures": [6], "errors": [0]}


@pytest.mark.parametrize("fails", ["drawn", "refused", "poisoned"])
def test_a_row_that_fails_leaves_none_of_an_earlier_runs_pictures(engine: Any, tmp_path: Path, fails: str):
    place = Place(str(tmp_path / "output"))
    row = SMALL | {"id": "a", "samples": 2, "steps": 1000 if fails == "refused" else 1}
    place.put("images/a-1.png", b"of a run that was killed", "image/png")
    place.put("images/b-0.png", b"another row's", "image/png")
    if fails == "poisoned":
        for _ in range(TOGETHER):
            Beginnings(place).together(0)
        for _ in range(ALONE):
            Beginnings(place).alone(0)
    records = drawn(Faulty(engine, *[GenerationFailed("nan_latents")] * 2), place, tmp_path, [row])
    assert [record["error"] is not None for record in records] == [True]
    assert place.names("images") == ["images/b-0.png"]


def test_a_pool_that_is_none_is_refused():
    for wrong in ({"least": 0}, {"least": 3, "most": 2}, {"cpus": 0.0}, {"gpus": -1.0}, {"block": 0}):
        with pytest.raises(InvalidRequest):
            Pool(**wrong)


def command(folder: Path, *more: str) -> list[str]:
    words = {"input": folder / "rows.jsonl", "output": folder / "output", "config": folder / "config.yaml"}
    options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    pool = ["--model", "sd15", "--num-cpus", "1", "--block", str(BLOCK), *more]
    return [sys.executable, "-m", "app.cli", "batch", *options, *pool]


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": TIMEOUT_S, "check": False}
    return subprocess.run(command(folder, *more), cwd=PROJECT, env=ENVIRONMENT, **options)


def killed_at(folder: Path, parts: int) -> list[psutil.Process]:
    """Runs the job until there are so many parts, and kills its process. Gives the processes that it had."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command(folder), cwd=PROJECT, env=ENVIRONMENT, stdout=log, stderr=log)
        deadline = time.monotonic() + TIMEOUT_S
        while len(list((folder / "output" / "parts").glob("*.jsonl"))) < parts:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.005)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    return children


@pytest.mark.timeout(600)  # on a crowded machine Ray takes minutes to start
def test_a_job_that_is_killed_goes_on_where_it_was(tmp_path: Path, engine: Any):
    lines = prompts(40)
    (tmp_path / "rows.jsonl").write_text("\n".join([*map(json.dumps, lines), "{no json", '{"prompt": "", "id": "x"}']))
    shipped = (PROJECT / "serve_config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(shipped.replace("&sd15\n", "&sd15\n      max_rows: 8\n"))
    children = killed_at(tmp_path, KILLED_AFTER)
    for process in children:
        with suppress(psutil.NoSuchProcess):
            if "Agent" in process.name():  # Ray's agents look for their parent now and then only
                process.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "Ray outlives the job's process"
    recorded = Manifest(Place(str(tmp_path / "output"))).recorded()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "output" / "images").iterdir()}
    assert KILLED_AFTER * BLOCK <= len(recorded) < len(lines), "it was killed in the midst"

    again = run(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "41 pictures and 2 errors" in again.stdout
    table = pq.read_table(tmp_path / "output" / "manifest.parquet").to_pylist()
    wanted = [(n, i) for n in range(42) for i in range(2 if n == 2 else 1)]
    assert [(r["number"], r["index"]) for r in table] == wanted
    twice = {name for name, at in before.items() if (tmp_path / "output" / "images" / name).stat().st_mtime_ns != at}
    assert not twice & {Path(r["path"]).name for r in table if r["path"] and r["number"] in recorded}
    assert len(twice) <= CALLS * BLOCK + 1  # one of the rows has two pictures
    check_pictures(tmp_path / "output", lines, table, engine)

    assert "41 pictures and 2 errors" in run(tmp_path).stdout
    refused = run(tmp_path, "--model", "sd21")
    assert refused.returncode == 1
    assert "differs in: model" in refused.stderr


def check_pictures(output: Path, lines: list[dict[str, Any]], table: list[dict[str, Any]], engine: Any) -> None:
    """Each is whole, and what the engine alone draws with the same seed."""
    files = {f"images/{path.name}" for path in (output / "images").iterdir()}
    assert files == {r["path"] for r in table if r["path"]}
    for record in table[:8]:
        body = {k: v for k, v in lines[record["number"]].items() if k not in ("id", "samples")}
        alone = GenerationRequest(model="sd15", **body | {"seed": record["seed"]})
        check(record, (output / record["path"]).read_bytes(), engine.generate([alone])[0][0].data)
