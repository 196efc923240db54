"""`python -m cluster.fetch_weights --to DIR ORG/NAME@COMMIT ...`: models from a hub onto a volume that all nodes share.

Of each model only what loading reads is fetched, and no file that can run code. What was interrupted goes on where it
was. A folder has its name, `DIR/ORG/NAME@COMMIT`, once every file in it has the SHA-256 that the lock file says, and
never changes after that.
"""

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from app.config_option import console
from cluster.hub import Hub, RemoteFile
from cluster.lock import Files, Lock, LockedFile
from models.errors import HeliographError, InvalidRequest
from models.families.sdxl import COMPONENTS  # those of the other families are among them
from models.weights import COMMIT, HUB_ID, check_safetensors, wanted

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
)


class Fetcher:
    """Fetches models from one hub into one folder, as one lock file says."""

    def __init__(self, hub: Hub, to: Path, lock: Lock, locking: bool):
        """`locking`: models that are not in the lock are added to it."""
        self._hub, self._to, self._lock, self._locking = hub, to, lock, locking

    def fetch(self, pinned: str) -> Path:
        """The folder of a model. Raises InvalidRequest where its files are not those of the lock."""
        model, _, commit = pinned.rpartition("@")
        if not HUB_ID.fullmatch(model) or not COMMIT.fullmatch(commit):
            raise InvalidRequest("model", f"`{pinned}` must be ORG/NAME@COMMIT with a commit of 40 hexadecimal digits")
        folder = self._to / pinned
        trusting = self._locking and not self._lock.has(pinned)
        if folder.is_dir():
            if trusting:
                advice = "keep the lock that it came with, or remove the folder to fetch it again"
                raise InvalidRequest("lock", f"{folder} is there, and not in this lock: {advice}")
            return folder
        locked = None if trusting else self._lock.files(pinned)
        files = self._hub.files(model, commit, wanted(COMPONENTS))
        _check_list(pinned, files, locked)
        draft = folder.with_name(f".{folder.name}.part")
        self._download(model, commit, files, draft)
        found = {file.path: _look_at(draft / file.path) for file in files}
        expected = locked or {f.path: LockedFile(bytes=f.bytes, sha256=f.sha256) for f in files if f.sha256}
        _check_content(pinned, draft, found, expected)
        if locked is None:  # before there is a folder, which would be taken for one that is locked
            self._lock.add(pinned, found)
        os.rename(draft, folder)
        _sync(folder.parent)
        return folder

    def _download(self, model: str, commit: str, files: list[RemoteFile], draft: Path) -> None:
        room = shutil.disk_usage(self._to).free
        missing = sum(f.bytes - (p.stat().st_size if (p := draft / f.path).exists() else 0) for f in files)
        if missing > room:
            raise InvalidRequest("to", f"{self._to} has room for {room} bytes, and {missing} are missing")
        with Progress(*COLUMNS, console=console) as bars:
            for file in files:
                bar = bars.add_task(f"{model} {file.path}", total=file.bytes)
                self._hub.download(
                    model, commit, file, draft / file.path, lambda done, bar=bar: bars.update(bar, completed=done)
                )


def _check_list(pinned: str, files: list[RemoteFile], locked: Files | None) -> None:
    """Raises InvalidRequest where the hub has other files than are locked, or no weights."""
    if not any(file.path.endswith(".safetensors") for file in files):
        raise InvalidRequest("model", f"{pinned} has no weights in .safetensors by the names that diffusers gives them")
    if locked is None:
        return
    offered = {(file.path, file.bytes) for file in files}
    if other := offered ^ {(path, file.bytes) for path, file in locked.items()}:
        paths = ", ".join(sorted({path for path, _ in other}))
        raise InvalidRequest("model", f"{pinned} differs from its lock in {paths}")


def _check_content(pinned: str, draft: Path, found: Files, expected: Files) -> None:
    """Raises InvalidRequest where a file is not what it has to be; it is deleted, so that it is fetched anew."""
    wrong = [path for path, file in expected.items() if found[path] != file]
    for path in wrong:
        (draft / path).unlink()
    if wrong:
        raise InvalidRequest("model", f"{pinned}: another SHA-256 than is locked: {', '.join(wrong)}")
    for path in found:
        if path.endswith(".safetensors"):
            check_safetensors(draft / path)


def _look_at(file: Path) -> LockedFile:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return LockedFile(bytes=file.stat().st_size, sha256=digest.hexdigest())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises InvalidRequest where another process fetches into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".fetching").open("w") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as taken:
            raise InvalidRequest("to", f"somebody else fetches into {folder} at the moment") from taken
        yield


def fetch_all(models: list[str], to: Path, lock_file: Path, locking: bool, endpoint: str | None) -> Mapping[str, Path]:
    """The folders of these models by `ORG/NAME@COMMIT`."""
    hub = Hub(endpoint)
    try:
        with alone(to):
            fetcher = Fetcher(hub, to, Lock(lock_file), locking)
            return {pinned: fetcher.fetch(pinned) for pinned in models}
    finally:
        hub.close()


def command(
    models: Annotated[list[str], typer.Argument(metavar="ORG/NAME@COMMIT...")],
    to: Annotated[Path, typer.Option(help="The folder that all nodes share.")],
    lock_file: Annotated[Path, typer.Option(help="Where the hashes are.")] = Path("weights.lock.json"),
    lock: Annotated[bool, typer.Option("--lock", help="Trust the hub this once, and write the hashes down.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="A hub other than the library's.")] = None,
) -> None:
    """Fetch models of pinned commits, verify their hashes, and resume what was interrupted."""
    try:
        for folder in fetch_all(models, to, lock_file, lock, endpoint).values():
            print(folder)
    except HeliographError as error:
        console.print("error", error, style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    typer.run(command)
