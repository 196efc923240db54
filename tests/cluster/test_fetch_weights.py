"""Weights from a hub on this machine: pinned, verified, resumed, and in place as a whole or not at all."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from cluster import hub as hub_module
from cluster.fetch_weights import alone, fetch_all
from cluster.lock import Lock
from models.errors import InvalidRequest, Unavailable

HOUSE = Path(__file__).resolve().parents[2]
MODEL = "org/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PINNED = f"{MODEL}@{COMMIT}"
UNET = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class Repository:
    """What the hub has, what it was asked for, and how it misbehaves."""

    folder: Path
    asked: list[tuple[str, str]] = field(default_factory=list)  # a path and its Range
    more: list[dict[str, Any]] = field(default_factory=list)  # entries of the list that are not in the folder
    cut_at: dict[str, int] = field(default_factory=dict)  # the connection breaks once, after so many bytes
    ranges: bool = True

    @property
    def paths(self) -> set[str]:
        return {path for path, _ in self.asked}


class Handler(BaseHTTPRequestHandler):
    """The list of a repository's files, and the files."""

    def __init__(self, *args: Any, repository: Repository):
        self.repository = repository
        super().__init__(*args)

    def do_GET(self) -> None:
        if self.path.startswith(f"/api/models/{MODEL}/tree/{COMMIT}"):
            self.answer(200, json.dumps([*map(self.entry, self.files()), *self.repository.more]).encode())
            return
        name = self.path.partition(f"/{MODEL}/resolve/{COMMIT}/")[2]
        if not name or not (self.repository.folder / name).is_file():
            self.send_error(404)
            return
        body, asked = (self.repository.folder / name).read_bytes(), self.headers.get("Range", "")
        self.repository.asked.append((name, asked))
        cut = self.repository.cut_at.pop(name, None)
        if asked and self.repository.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.answer(206, body[start:], cut)
        else:
            self.answer(200, body, cut)

    def files(self) -> list[Path]:
        return [file for file in self.repository.folder.rglob("*") if file.is_file()]

    def entry(self, file: Path) -> dict[str, Any]:
        path, size = str(file.relative_to(self.repository.folder)), file.stat().st_size
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": COMMIT}
        if file.suffix == ".safetensors":
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            entry["lfs"] = {"size": size, "oid": digest, "pointerSize": 134}
        return entry

    def answer(self, status: int, body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """The small sd15 as a repository, with what must not be fetched beside it."""
    folder = tmp_path / "repository"
    shutil.copytree(HOUSE / "models" / "embedded" / "sd15", folder)
    for name in ("model.ckpt", "v1-5.safetensors", "unet/diffusion_pytorch_model.bin", "unet/run.py"):
        (folder / name).write_bytes(b"not for us")
    return Repository(folder)


@pytest.fixture
def endpoint(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(hub_module, "TRIES", 3)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, repository=repository))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    return tmp_path / "weights.lock.json"


def fetch(endpoint: str, to: Path, lock_file: Path, locking: bool = False) -> Path:
    return fetch_all([PINNED], to, lock_file, locking, endpoint)[PINNED]


def test_a_model_is_fetched_without_what_could_run_and_locked(
    endpoint: str, repository: Repository, tmp_path: Path, lock_file: Path
):
    folder = fetch(endpoint, tmp_path / "models", lock_file, locking=True)
    assert folder == tmp_path / "models" / "org" / f"name@{COMMIT}"
    assert {Path(path).suffix for path in repository.paths} == {".json", ".txt", ".safetensors"}
    assert "v1-5.safetensors" not in repository.paths
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert there == repository.paths == set(Lock(lock_file).files(PINNED))
    assert (folder / UNET).read_bytes() == (repository.folder / UNET).read_bytes()
    repository.asked.clear()
    again = fetch(endpoint, tmp_path / "elsewhere", lock_file)  # by the lock, on another machine
    assert {p.relative_to(again) for p in again.rglob("*")} == {p.relative_to(folder) for p in folder.rglob("*")}
    repository.asked.clear()
    assert fetch(endpoint, tmp_path / "elsewhere", lock_file) == again
    assert not repository.asked, "what is there was fetched again"


def test_a_model_is_locked_before_it_is_there(
    endpoint: str, tmp_path: Path, lock_file: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as ending:
        ending.setattr("cluster.fetch_weights.os.rename", Mock(side_effect=InterruptedError))
        with pytest.raises(InterruptedError):
            fetch(endpoint, tmp_path / "models", lock_file, locking=True)
    before = lock_file.read_text()
    folder = fetch(endpoint, tmp_path / "models", lock_file, locking=True)
    assert lock_file.read_text() == before
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert there == set(Lock(lock_file).files(PINNED))


def test_what_lies_there_already_is_not_taken_for_the_hubs(endpoint: str, tmp_path: Path, lock_file: Path):
    fetch(endpoint, tmp_path / "models", lock_file, locking=True)
    lock_file.unlink()
    with pytest.raises(InvalidRequest, match="not in this lock"):
        fetch(endpoint, tmp_path / "models", lock_file, locking=True)
    assert not lock_file.exists()


def test_a_model_that_is_not_locked_is_refused(endpoint: str, repository: Repository, tmp_path: Path, lock_file: Path):
    with pytest.raises(InvalidRequest, match="--lock"):
        fetch(endpoint, tmp_path / "models", lock_file)
    assert not repository.asked


def test_a_download_goes_on_where_the_connection_broke(
    endpoint: str, repository: Repository, tmp_path: Path, lock_file: Path
):
    repository.cut_at[UNET] = 1000
    folder = fetch(endpoint, tmp_path / "models", lock_file, locking=True)
    assert [asked for path, asked in repository.asked if path == UNET] == ["", "bytes=1000-"]
    assert (folder / UNET).read_bytes() == (repository.folder / UNET).read_bytes()


def test_a_server_without_ranges_gives_it_from_the_beginning(
    endpoint: str, repository: Repository, tmp_path: Path, lock_file: Path
):
    repository.cut_at[UNET], repository.ranges = 1000, False
    folder = fetch(endpoint, tmp_path / "models", lock_file, locking=True)
    assert (folder / UNET).read_bytes() == (repository.folder / UNET).read_bytes()


def test_what_was_interrupted_goes_on_and_has_no_name_before_it_is_whole(
    endpoint: str, repository: Repository, tmp_path: Path, lock_file: Path, monkeypatch: pytest.MonkeyPatch
):
    fetch(endpoint, tmp_path / "first", lock_file, locking=True)
    repository.asked.clear()
    monkeypatch.setattr(hub_module, "TRIES", 1)
    repository.cut_at[UNET] = 1000
    with pytest.raises(Unavailable):
        fetch(endpoint, tmp_path / "models", lock_file)
    assert not (tmp_path / "models" / "org" / f"name@{COMMIT}").exists()
    fetched = repository.paths
    repository.asked.clear()
    assert fetch(endpoint, tmp_path / "models", lock_file).is_dir()
    assert ("unet/diffusion_pytorch_model.safetensors", "bytes=1000-") in repository.asked
    assert not repository.paths & (fetched - {UNET}), "what was there was fetched again"


def test_another_content_of_the_same_length_is_refused_and_fetched_anew(
    endpoint: str, repository: Repository, tmp_path: Path, lock_file: Path
):
    fetch(endpoint, tmp_path / "first", lock_file, locking=True)
    original = (repository.folder / UNET).read_bytes()
    (repository.folder / UNET).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(InvalidRequest, match=UNET):
        fetch(endpoint, tmp_path / "models", lock_file)
    assert not (tmp_path / "models" / "org" / f"name@{COMMIT}").exists()
    (repository.folder / UNET).write_bytes(original)
    assert fetch(endpoint, tmp_path / "models", lock_file).is_dir()


def test_another_list_of_files_is_refused(endpoint: str, repository: Repository, tmp_path: Path, lock_file: Path):
    fetch(endpoint, tmp_path / "first", lock_file, locking=True)
    (repository.folder / "unet" / "more.json").write_text("{}")
    repository.asked.clear()
    with pytest.raises(InvalidRequest, match=r"unet/more\.json"):
        fetch(endpoint, tmp_path / "models", lock_file)
    assert not repository.asked


def test_a_path_that_leads_out_of_the_folder_is_refused(
    endpoint: str, repository: Repository, tmp_path: Path, lock_file: Path
):
    entry = {"type": "file", "path": "unet/../../../outside.json", "size": 2, "oid": COMMIT}
    repository.more.append(entry)
    with pytest.raises(InvalidRequest, match="leads out"):
        fetch(endpoint, tmp_path / "models", lock_file, locking=True)
    assert not repository.asked


def test_a_repository_of_pickles_is_refused(endpoint: str, repository: Repository, tmp_path: Path, lock_file: Path):
    for file in repository.folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(InvalidRequest, match="no weights"):
        fetch(endpoint, tmp_path / "models", lock_file, locking=True)


@pytest.mark.parametrize("pinned", ["org/name", "org/name@main", f"../name@{COMMIT}", f"name@{COMMIT}"])
def test_what_is_not_pinned_is_refused(tmp_path: Path, lock_file: Path, pinned: str):
    with pytest.raises(InvalidRequest, match="ORG/NAME@COMMIT"):
        fetch_all([pinned], tmp_path, lock_file, True, "http://127.0.0.1:9")


def test_a_commit_that_is_not_there_is_refused(endpoint: str, tmp_path: Path, lock_file: Path):
    with pytest.raises(InvalidRequest, match="cannot be listed"):
        fetch_all([f"{MODEL}@{'f' * 40}"], tmp_path, lock_file, True, endpoint)


def test_two_do_not_fetch_into_one_folder(endpoint: str, tmp_path: Path, lock_file: Path):
    with alone(tmp_path / "models"), pytest.raises(InvalidRequest, match="somebody else"):
        fetch(endpoint, tmp_path / "models", lock_file, locking=True)


def test_a_file_that_is_no_lock_is_refused(tmp_path: Path, lock_file: Path):
    lock_file.write_text('{"org/name@x": {"a.json": {"sha256": "short"}}}')
    with pytest.raises(InvalidRequest, match="not a lock"):
        Lock(lock_file)
