"""Objects in a local folder. An object is a folder with one file in it, `<key>.object/<sha256>.png`.

The file is written and synced inside a draft, and the draft is renamed to its place: POSIX renames a folder at once or
not at all, and never onto one that holds something. So a key is written once, whoever else writes it at that moment,
and a process that is killed leaves nothing or the whole object behind, with its hash and its type in its name.
"""

import asyncio
import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import ParamSpec, TypeVar

from app.stores import store
from app.stores.links import Links
from app.stores.store import CONTENT_TYPES, Span, StorageFull, StoredObject, StoreUnavailable
from models.errors import NotFound

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT_S = 60.0  # a disk that takes longer, such as a network's, has gone
DRAFTS = ".drafts"
DRAFT_AGE_S = 3600.0  # no put takes that long, so its process is gone
SUFFIX = ".object"
LISTED_AT_ONCE = 500
MOVES = 10  # of a draft to its place, while others remove the folder

_TYPES = {f".{ending}": content_type for content_type, ending in CONTENT_TYPES.items()}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


class Folder:
    """A store in a folder of a POSIX filesystem, which several processes may share."""

    def __init__(self, root: Path, links: Links):
        """Opens the folder, or makes it, and removes what killed processes left unfinished."""
        self._root, self._drafts, self._links = root, root / DRAFTS, links
        _make_folders(self._drafts.absolute())
        self._discard_old_drafts()

    async def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
        wanted = store.describe(key, data, content_type)
        await _aside(self._write, wanted, data)
        return wanted

    async def get(self, key: str, span: Span | None = None) -> bytes:
        return await _aside(self._read, key, span)

    async def head(self, key: str) -> StoredObject:
        return await _aside(self._find, key)

    async def delete(self, key: str) -> None:
        await _aside(self._remove, key)

    async def list(self, older_than_s: float, folder: str = "") -> AsyncIterator[str]:
        keys = self._walk(self._root / folder, time.time() - older_than_s)
        while some := await _aside(lambda: [*islice(keys, LISTED_AT_ONCE)]):
            for key in some:
                yield key

    async def url(self, key: str, expires_s: int) -> str:
        address = await self.sign(key, expires_s)
        await self.head(key)
        return address

    async def sign(self, key: str, expires_s: int) -> str:
        store.check_key(key)
        store.check_expiry(expires_s)
        return self._links.url(key, expires_s)

    def _write(self, wanted: StoredObject, data: bytes) -> None:
        place = self._place(wanted.key)
        draft = Path(tempfile.mkdtemp(dir=self._drafts))
        try:
            _write_through(draft / f"{wanted.sha256}.{CONTENT_TYPES[wanted.content_type]}", data)
            _sync(draft)
            _move(draft, place)
        except OSError as fault:
            if fault.errno not in _OCCUPIED:
                raise
            store.check_same(self._find(wanted.key), wanted)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # gone already where all went well
        # Also where another writer was first, who may not have come this far yet.
        for folder in place.parents[: len(wanted.key.split("/"))]:
            with suppress(FileNotFoundError):  # somebody has deleted the object again, and with it the folder
                _sync(folder)

    def _read(self, key: str, span: Span | None) -> bytes:
        path = self._file(key)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                first, last = span or (0, size)
                store.check_span((first, last), size)
                file.seek(first)
                return file.read(last - first)
        except FileNotFoundError as gone:
            raise store.missing(key) from gone

    def _find(self, key: str) -> StoredObject:
        path = self._file(key)
        try:
            size = path.stat().st_size
        except FileNotFoundError as gone:
            raise store.missing(key) from gone
        return StoredObject(key=key, bytes=size, sha256=path.stem, content_type=_TYPES[path.suffix])

    def _file(self, key: str) -> Path:
        try:
            return next(self._place(key).iterdir())
        except (FileNotFoundError, StopIteration) as gone:  # it stops where a deletion has just taken the file
            raise store.missing(key) from gone

    def _remove(self, key: str) -> None:
        place, gone = self._place(key), self._drafts / uuid.uuid4().hex
        with suppress(FileNotFoundError):
            place.rename(gone)
            _sync(place.parent)
            shutil.rmtree(gone)
        with suppress(OSError):  # a folder that holds something else stays, and so do those above it
            for folder in place.parents[: key.count("/")]:
                folder.rmdir()

    def _walk(self, start: Path, before: float) -> Iterator[str]:
        for folder, inside, _ in os.walk(start):
            objects = [name for name in inside if name.endswith(SUFFIX)]
            inside[:] = [name for name in inside if not name.endswith(SUFFIX) and name != DRAFTS]
            for name in objects:
                key = str(Path(folder, name).relative_to(self._root)).removesuffix(SUFFIX)
                if not store.KEY.fullmatch(key):  # somebody else's
                    continue
                with suppress(FileNotFoundError, NotFound):  # deleted at this moment
                    if self._file(key).stat().st_mtime < before:
                        yield key

    def _place(self, key: str) -> Path:
        store.check_key(key)
        return self._root / f"{key}{SUFFIX}"

    def _discard_old_drafts(self) -> None:
        for draft in self._drafts.iterdir():
            with suppress(FileNotFoundError):
                if draft.stat().st_mtime < time.time() - DRAFT_AGE_S:
                    shutil.rmtree(draft)


async def _aside(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Does the work in a thread, within the deadline, and gives what the disk says a name."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.to_thread(work, *args, **kwargs)
    except TimeoutError as late:
        raise StoreUnavailable(message=f"the folder for pictures took longer than {TIMEOUT_S:.0f} s") from late
    except OSError as fault:
        if fault.errno in _NO_ROOM:
            raise StorageFull() from fault
        raise StoreUnavailable(message=f"the folder for pictures fails: {fault.strerror}") from fault


def _move(draft: Path, place: Path) -> None:
    """Renames a draft to its place, whose folder may be removed at this moment: it has just become empty."""
    for last in (*[False] * (MOVES - 1), True):
        try:
            with suppress(FileExistsError):  # it was there, and was removed while mkdir looked what it is
                place.parent.mkdir(parents=True, exist_ok=True)
            draft.rename(place)
            return
        except FileNotFoundError:
            if last:
                raise


def _write_through(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_folders(folder: Path) -> None:
    """Makes the folder and those above it, each entered on disk before the next."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Writes the entries of a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
