"""What a folder keeps through kills, full disks and company."""

import asyncio
import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.stores.folder import DRAFT_AGE_S, DRAFTS, Folder
from app.stores.links import Links
from app.stores.store import KeyTaken, StoreUnavailable
from tests.app.stores.conftest import SECRET

ROOT = Path(__file__).resolve().parents[3]

# Puts pictures of all sizes for ever and says each key once it is kept.
WRITER = """
import asyncio, itertools, os, random, sys
from pathlib import Path
from app.stores.folder import Folder
from app.stores.links import Links

async def main(root, name):
    folder = Folder(Path(root), Links(b"s" * 32))
    for n in itertools.count():
        await folder.put(f"{name}/{n}", os.urandom(random.choice((1, 5_000, 2_000_000))), "image/png")
        print(f"{name}/{n}", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""

# What comes of a large picture and then of a small one, with files limited to 100 kB.
SMALL_DISK = """
import asyncio, os, resource, sys
from pathlib import Path
from app.stores.folder import Folder
from app.stores.links import Links
from app.stores.store import StorageFull

async def main(root):
    folder = Folder(Path(root), Links(b"s" * 32))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        await folder.put("large", os.urandom(1_000_000), "image/png")
    except StorageFull as full:
        print(full.message)
    await folder.put("small", b"picture", "image/png")
    print((await folder.get("small")).decode())

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def writer(root: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), name], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def kept_until_killed(root: Path, name: str, after_s: float) -> list[str]:
    """What a writer said it had kept when it was killed, so long after the first."""
    with writer(root, name) as process:
        assert process.stdout
        first = process.stdout.readline()
        time.sleep(after_s)
        process.kill()
        return (first + process.stdout.read()).split()


async def test_a_kill_at_any_moment_loses_nothing_and_leaves_no_part_of_an_object(tmp_path: Path):
    root, kept = tmp_path / "pictures", []
    for n in range(12):
        kept += kept_until_killed(root, f"w{n}", random.uniform(0, 0.03))
    folder = Folder(root, Links(SECRET))
    found = {key async for key in folder.list(-1)}
    assert set(kept) <= found
    for key in found:
        stored, data = await folder.head(key), await folder.get(key)
        assert data
        assert (len(data), hashlib.sha256(data).hexdigest()) == (stored.bytes, stored.sha256)


async def test_what_a_kill_left_unfinished_is_removed_later(tmp_path: Path):
    drafts = tmp_path / DRAFTS
    for name in ("old", "young"):
        (drafts / name).mkdir(parents=True)
        (drafts / name / "half.png").write_bytes(b"half")
    long_ago = time.time() - DRAFT_AGE_S - 1
    os.utime(drafts / "old", (long_ago, long_ago))
    folder = Folder(tmp_path, Links(SECRET))
    assert [draft.name for draft in drafts.iterdir()] == ["young"]
    assert [key async for key in folder.list(-1)] == []


def test_a_full_disk_is_a_typed_error_and_nothing_stays(tmp_path: Path):
    ran = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "There is no room left for pictures. Try again when the operator has made some.",
        "picture",
    ]
    files = {path.relative_to(tmp_path).parts[0]: path.stat().st_size for path in tmp_path.rglob("*.png")}
    assert files == {"small.object": len(b"picture")}
    assert not list((tmp_path / DRAFTS).iterdir())


async def test_of_different_writers_of_a_key_one_wins(folder: Folder):
    pictures = [bytes([n]) * 200_000 for n in range(16)]
    puts = (folder.put("a/b", picture, "image/png") for picture in pictures)
    outcomes = await asyncio.gather(*puts, return_exceptions=True)
    [winner] = [n for n, outcome in enumerate(outcomes) if not isinstance(outcome, KeyTaken)]
    assert await folder.get("a/b") == pictures[winner]


async def test_readers_never_see_a_part_while_others_write_and_delete(folder: Folder):
    picture = os.urandom(500_000)
    seen = 0

    async def change() -> None:
        for _ in range(40):
            await folder.put("a", picture, "image/png")
            await folder.delete("a")

    changing = asyncio.create_task(change())
    while not changing.done():
        outcome = (await asyncio.gather(folder.get("a"), return_exceptions=True))[0]
        if isinstance(outcome, bytes):
            assert outcome == picture
            seen += 1
    await changing
    assert seen


async def test_a_folder_that_is_gone_or_closed_is_unavailable(folder: Folder, tmp_path: Path):
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreUnavailable):
        await folder.put("a", b"picture", "image/png")


async def test_the_secret_is_in_no_representation(folder: Folder):
    assert "sss" not in repr(folder._links)


async def test_folders_that_have_become_empty_go_with_their_objects(folder: Folder, tmp_path: Path):
    for key in ("results/a/0", "results/a/1", "results/b/0"):
        await folder.put(key, b"picture", "image/png")
    await folder.delete("results/a/0")
    assert (tmp_path / "pictures" / "results" / "a").is_dir()
    await folder.delete("results/a/1")
    assert [place.name for place in (tmp_path / "pictures" / "results").iterdir()] == ["b"]
    await folder.delete("results/b/0")
    assert [place.name for place in (tmp_path / "pictures").iterdir()] == [DRAFTS]


async def test_who_writes_into_a_folder_that_is_being_emptied_writes(folder: Folder):
    async def change(name: str) -> None:
        for n in range(60):
            await folder.put(f"a/b/{name}-{n}", b"picture", "image/png")
            await folder.delete(f"a/b/{name}-{n}")

    await asyncio.gather(*(change(f"w{n}") for n in range(4)))
    await folder.put("a/b/c", b"picture", "image/png")
    assert [key async for key in folder.list(-1)] == ["a/b/c"]


async def test_what_is_not_named_like_ours_is_not_listed(folder: Folder, tmp_path: Path):
    await folder.put("pictures/a", b"picture", "image/png")
    for name in ("Backup.object", "pictures/a b.object", ".object"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "x.png").write_bytes(b"somebody else's")
    assert [key async for key in folder.list(-1)] == ["pictures/a"]
