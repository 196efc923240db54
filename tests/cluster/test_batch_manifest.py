"""The manifest of a batch job, in a folder and on real S3 servers: whose it is, and how its parts become one."""

import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from app.settings import ModelSettings
from app.stores.store import StoreUnavailable
from cluster.batch import _OF_PICTURES
from cluster.manifest import SCHEMA, Manifest
from cluster.place import Place
from models.errors import InvalidRequest
from tests.app.stores.conftest import BUCKET, CREDENTIALS

JOB = {"version": 1, "input": "ab", "model": {"name": "sd15"}}


def record(number: int, index: int = 0, **values: Any) -> dict[str, Any]:
    return dict.fromkeys(SCHEMA.names) | {"number": number, "id": f"row-{number}", "index": index} | values


@pytest.fixture(params=["folder", "moto", "rclone"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty place of each kind; credentials come from the environment, as they do for a job."""
    if request.param == "folder":
        return Place(str(tmp_path / "output"))
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(f"AWS_{name.upper()}", value)
    endpoint = request.getfixturevalue(request.param)
    return Place(f"s3://{BUCKET}/{uuid.uuid4().hex}/deep", endpoint, "us-east-1")


def test_a_place_keeps_objects_by_name(place: Place):
    assert place.get("images/a-0.png") is None
    place.put("images/a-0.png", b"one", "image/png")
    place.put("images/a-0.png", b"two", "image/png")
    place.put("images/b.c-0.png", b"three", "image/png")
    assert place.get("images/a-0.png") == b"two"
    assert (place.has("images/a-0.png"), place.has("images/a")) == (True, False)
    assert place.names("images") == ["images/a-0.png", "images/b.c-0.png"]
    assert place.names("parts") == []
    place.delete("images/a-0.png", "images/a-0.png")
    assert place.names("images") == ["images/b.c-0.png"]


def test_parts_become_one_in_the_order_of_the_input(place: Place, tmp_path: Path):
    manifest = Manifest(place)
    manifest.begin(JOB)
    manifest.add(4, [record(4), record(6, error='{"code": "x"}')])
    manifest.add(0, [record(0, 1, path="b"), record(0, 0, path="a"), record(2)])
    manifest.add(2, [record(2, path="of a driver that was thought dead"), record(3)])
    assert (manifest.recorded(), manifest.part(4), manifest.part(6)) == ({0, 2, 3, 4, 6}, {4, 6}, set())
    assert manifest.finish(range(7)) == {1, 5}
    assert not manifest.whole
    assert manifest.finish([0, 2, 3, 4, 6]) == set()
    assert manifest.finish() == set()
    assert manifest.whole
    assert manifest.counts() == (5, 1)
    assert place.names("parts") == []
    (tmp_path / "manifest.parquet").write_bytes(place.get("manifest.parquet") or b"")
    table = pq.read_table(tmp_path / "manifest.parquet")
    assert table.schema.equals(SCHEMA)
    lines = [(row["number"], row["index"], row["path"]) for row in table.to_pylist()]
    assert lines == [(0, 0, "a"), (0, 1, "b"), (2, 0, None), (3, 0, None), (4, 0, None), (6, 0, None)]


def test_the_count_leaves_nothing_to_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A thread of Arrow's own that lets go of Python's bytes while the process ends aborts it."""
    place = Place(str(tmp_path))
    Manifest(place).add(0, [record(0)])
    Manifest(place).finish()
    whole = place.get("manifest.parquet")
    monkeypatch.setattr(place, "get", lambda _name: whole)
    held = sys.getrefcount(whole)
    for _ in range(50):  # with `pq.read_table` two of three are held still
        assert Manifest(place).counts() == (1, 0)
        assert sys.getrefcount(whole) == held


def test_parts_are_read_and_removed_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manifest, both = Manifest(Place(str(tmp_path))), threading.Barrier(2)
    for number in (0, 1):
        manifest.add(number, [record(number)])
    for name in ("get", "delete"):
        alone = getattr(Place, name)

        def beside(place: Place, part: str, alone: Callable[[Place, str], bytes | None] = alone) -> bytes | None:
            if part.startswith("parts/"):
                both.wait(timeout=20)
            return alone(place, part)

        monkeypatch.setattr(Place, name, beside)
    assert manifest.recorded() == {0, 1}
    manifest.finish()
    assert manifest.counts() == (2, 0)


def test_a_place_belongs_to_one_job(place: Place):
    Manifest(place).begin(JOB)
    Manifest(place).begin(JOB)
    with pytest.raises(InvalidRequest, match="differs in: input, model"):
        Manifest(place).begin(JOB | {"input": "cd", "model": {"name": "sdxl"}})


def test_a_field_that_an_older_version_did_not_know_makes_no_other_job(place: Place):
    Manifest(place).begin(JOB)
    known = JOB["model"] | {"fp8": False, "defaults": {"guidance_input": None}}
    with pytest.raises(InvalidRequest, match="differs in: model"):
        Manifest(place).begin(JOB | {"model": known | {"fp8": True}})
    Manifest(place).begin(JOB | {"model": {key: value for key, value in known.items() if key != "defaults"}})


def test_every_setting_of_a_model_is_one_that_pictures_depend_on_or_is_not():
    of_the_machine = {"device", "offload", "threads", "max_rows", "lora_cache_mib", "graphs", "compiled"}
    of_the_machine |= {"sizes", "measured"}
    of_the_server = {"max_waiting", "max_wait_s", "routing", "hold_s"}
    assert set(ModelSettings.model_fields) == _OF_PICTURES | of_the_machine | of_the_server


def test_a_manifest_without_a_job_is_not_written_over(place: Place):
    place.put("parts/000000000.jsonl", b"", "application/jsonl")
    with pytest.raises(InvalidRequest, match=r"without job\.json"):
        Manifest(place).begin(JOB)


def test_a_place_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for output in (str(tmp_path / "file"), str(tmp_path / "file" / "deep"), "s3://"):
        with pytest.raises(InvalidRequest, match="output"):
            Place(output)


def test_a_place_that_takes_no_more_says_so(tmp_path: Path):
    place = Place(str(tmp_path / "output"))
    (tmp_path / "output" / "images").write_text("a file where a folder should be")
    with pytest.raises(StoreUnavailable):
        place.put("images/a-0.png", b"one", "image/png")
