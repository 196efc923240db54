"""Each fault is one while it lasts, for the application's own code, and none after that."""

import asyncio
import sqlite3
from pathlib import Path

import psutil
import pytest

from app.database import Database
from app.jobs.job import NewJob
from app.jobs.store import JobStore
from app.stores.folder import Folder
from app.stores.links import Links
from app.stores.store import StorageFull
from models.errors import Unavailable
from tests.faults.databases import Sqlite
from tests.faults.injector import SMALLEST_FILE, without_room

PICTURE = b"p" * 2 * SMALLEST_FILE
JOB = NewJob(owner="ada", model="sd15", kind="generate", request={"prompt": "a red circle"})


async def test_a_full_disk_refuses_pictures_and_jobs_until_there_is_room_again(tmp_path: Path):
    folder = Folder(tmp_path / "pictures", Links(b"s" * 32, ""))
    database = Database(f"sqlite:///{tmp_path / 'jobs.db'}")
    await database.migrate()
    store = JobStore(database)
    with without_room([psutil.Process()]):
        with pytest.raises(StorageFull):
            await folder.put("a/b", PICTURE, "image/png")
        with pytest.raises(Unavailable):
            await store.submit(JOB)
    assert await folder.put("a/b", PICTURE, "image/png")
    assert (await store.submit(JOB)).job.owner == "ada"
    await database.close()


async def test_a_database_that_is_away_takes_nothing_until_it_is_back(tmp_path: Path):
    path = tmp_path / "jobs.db"
    other = sqlite3.connect(path, timeout=0.0, isolation_level=None)
    other.execute("CREATE TABLE pictures (key TEXT)")
    outage = asyncio.create_task(Sqlite(path).outage(lasts_s=0.5, choice=0.0))
    await asyncio.sleep(0.25)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("INSERT INTO pictures VALUES ('a')")
    assert await outage == "its write lock was held"
    other.execute("INSERT INTO pictures VALUES ('a')")
    other.close()
