"""The server's secret file."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.secret import derive, read_or_make
from models.errors import InvalidRequest


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path: Path):
    path = tmp_path / "data" / "secret"
    with ThreadPoolExecutor(16) as threads:
        found = set(threads.map(lambda _: read_or_make(path), range(64)))
    assert len(found) == 1
    assert len(found.pop()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["secret"]
    assert read_or_make(tmp_path / "another") != read_or_make(path)


def test_a_secret_that_is_short_is_refused(tmp_path: Path):
    (tmp_path / "secret").write_text("hunter2\n")
    with pytest.raises(InvalidRequest, match="32 random bytes"):
        read_or_make(tmp_path / "secret")


def test_each_purpose_has_a_key_of_its_own():
    assert len({derive(b"s" * 32, "pictures"), derive(b"s" * 32, "api keys"), derive(b"t" * 32, "pictures")}) == 3
