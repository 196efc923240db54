"""Results on both databases and in a real folder: kept, found again, for their owner alone, and removed in time."""

import asyncio
import hashlib
import os
import time
from pathlib import Path

import pytest
from sqlalchemy import update

from app import job_runner
from app.database import Database
from app.jobs.job import NewJob
from app.jobs.store import JobStore
from app.results.keeping import keep
from app.results.receipt import Drawn, compose
from app.results.results import ADDRESS_S, Results, Swept, new_id
from app.results.table import results as table
from app.stores.folder import Folder
from app.stores.links import Links
from app.stores.sweep import GRACE_S
from models.errors import InvalidRequest, NotFound, Unavailable
from models.metadata import named
from tests.app.loopback import until
from tests.app.results.conftest import KEEP_S, SECRET, WHITE, drawn

ABOUT = "f" * 64


async def kept(results: Results, what: Drawn, owner: str = "ada", about: str | None = ABOUT) -> str:
    id = new_id()
    await results.put_inputs(id, what.request)
    await results.record(owner, compose(id, 0, what), await results.put(id, what.images), about)
    return id


async def older(database: Database, id: str, seconds: float) -> None:
    """Makes a result older by that much."""
    times = {name: table.c[name] - seconds for name in ("created_at", "expires_at")}
    await database.write(lambda c: c.execute(update(table).where(table.c.id == id).values(times)))


def age(root: Path) -> None:
    """Makes everything stored older than the sweep's grace."""
    then = time.time() - GRACE_S - 60
    for file in root.rglob("*.*"):
        os.utime(file, (then, then))


async def stored(folder: Folder) -> set[str]:
    """All but the mark of the database."""
    return {key async for key in folder.list(-60.0) if not key.startswith("heliograph/")}


async def test_a_result_is_found_again_with_its_pictures(results: Results):
    what = drawn(samples=2)
    id = await kept(results, what)
    found = await results.find("ada", ABOUT)
    assert found is not None
    assert found.id == id
    assert await results.files(found) == tuple(image.data for image in what.images)
    assert 0 < found.expires_s <= KEEP_S
    assert await results.find("ada", "0" * 64) is None


async def test_a_receipt_says_all_that_drawing_again_needs(results: Results):
    what = drawn(image=WHITE)
    receipt = (await results.get("ada", await kept(results, what))).receipt
    assert receipt["model"] == "sd15"
    assert (receipt["revision"], receipt["device"], receipt["dtype"]) == ("abc", "cpu", "float32")
    assert receipt["versions"] == {"torch": "2"}
    assert receipt["request"]["seed"] == 7
    assert receipt["request"]["image"] == named(WHITE)
    [image] = receipt["images"]
    assert image["sha256"] == hashlib.sha256(what.images[0].data).hexdigest()
    assert image["pixels_sha256"] == hashlib.sha256(b"\x07" * (3 * 128 * 128)).hexdigest()
    assert receipt["warnings"] == ["a word of warning"]


async def test_another_callers_result_is_like_one_that_never_was(results: Results):
    id = await kept(results, drawn())
    assert await results.find("eve", ABOUT) is None
    with pytest.raises(NotFound) as not_hers:
        await results.get("eve", id)
    with pytest.raises(NotFound) as never:
        await results.get("eve", "0" * 32)
    assert not_hers.value.message.replace(id, "") == never.value.message.replace("0" * 32, "")
    with pytest.raises(NotFound):
        await results.get("ada", "../" + id)


async def test_the_newest_of_equal_results_counts(results: Results, database: Database):
    await older(database, await kept(results, drawn()), 60)
    newest = await kept(results, drawn())
    found = await results.find("ada", ABOUT)
    assert found is not None
    assert found.id == newest


async def test_input_pictures_come_back_to_the_pixel_until_they_have_gone(results: Results, folder: Folder):
    found = await results.get("ada", await kept(results, drawn(image=WHITE)))
    assert await results.input(found, named(WHITE)) == WHITE
    await folder.delete(f"results/{found.id}/{named(WHITE)['sha256']}")
    with pytest.raises(InvalidRequest, match="no longer kept"):
        await results.input(found, named(WHITE))


async def test_what_is_over_its_time_is_not_found_and_removed(results: Results, folder: Folder, database: Database):
    over, alive = await kept(results, drawn(image=WHITE)), await kept(results, drawn(), about="0" * 64)
    await older(database, over, KEEP_S + 1)
    assert await results.find("ada", ABOUT) is None
    with pytest.raises(NotFound):
        await results.get("ada", over)
    assert await results.keep_house() == Swept(results=1, objects=0)
    assert await stored(folder) == {f"results/{alive}/0"}


async def test_orphans_are_swept_once_they_are_old_and_nothing_else(
    results: Results, folder: Folder, database: Database, tmp_path: Path
):
    jobs = JobStore(database)
    new = NewJob(owner="ada", model="sd15", kind="txt2img", request={}, inputs="1" * 32, work=1.0)
    job = (await jobs.submit(new)).job
    [claim] = await jobs.claim("runner-1", ["sd15"], 1, 10.0)
    await jobs.output(claim, {"index": 0, "key": f"results/{job.id}/1-0"})
    owned = await kept(results, drawn())
    orphan = await results.put(new_id(), drawn().images)
    others = {f"results/{job.id}/1-0", f"inputs/{job.inputs}/0", "elsewhere/somebody/0"}
    untold = {f"results/{job.id}/1-1", f"inputs/{new_id()}/0"}
    for key in others | untold:
        await folder.put(key, b"a picture", "image/png")
    assert await results.keep_house() == Swept(results=0, objects=0)  # it may be on its way still
    age(tmp_path / "pictures")
    young = await results.put(new_id(), drawn().images)
    assert await results.keep_house() == Swept(results=0, objects=3)
    assert await stored(folder) == {f"results/{owned}/0", *others, *young}
    assert not set(orphan) & await stored(folder)


async def test_an_empty_or_another_database_removes_no_picture_of_a_store(
    results: Results, folder: Folder, database: Database, tmp_path: Path
):
    owned = await kept(results, drawn())
    await results.keep_house()  # marks the store
    age(tmp_path / "pictures")
    other = Database(f"sqlite:///{tmp_path / 'other.db'}")
    await other.migrate()
    theirs = Results(other, folder, KEEP_S)
    with pytest.raises(InvalidRequest, match="nothing was swept"):
        await theirs.keep_house()
    await kept(theirs, drawn(), about=None)  # now it knows of a picture, but of no other
    for both in (theirs, results):
        with pytest.raises(InvalidRequest, match="another database's too"):
            await both.keep_house()
    assert f"results/{owned}/0" in await stored(folder)
    await other.close()


async def test_a_server_that_starts_says_so_in_the_store_before_it_knows_of_a_picture(
    results: Results, folder: Folder, database: Database, tmp_path: Path
):
    await kept(results, drawn())
    await results.keep_house()
    other = Database(f"sqlite:///{tmp_path / 'other.db'}")
    await other.migrate()
    for _ in range(2):
        await Results(other, folder, KEEP_S).mark()
    age(tmp_path / "pictures")
    with pytest.raises(InvalidRequest, match="another database's too"):
        await results.keep_house()
    await Results(other, None, KEEP_S).mark()
    await other.close()


async def test_a_result_is_found_until_an_address_would_outlive_it(results: Results, database: Database):
    id = await kept(results, drawn())
    await older(database, id, KEEP_S - ADDRESS_S - 60)
    assert await results.find("ada", ABOUT) is not None
    await older(database, id, 120)
    assert await results.find("ada", ABOUT) is None
    assert (await results.get("ada", id)).expires_s > 0


async def test_without_a_store_there_are_receipts_and_no_pictures(database: Database):
    results = Results(database, None, KEEP_S)
    made = await keep(results, "ada", drawn(image=WHITE), about="f", pictures=True)
    assert (made.keys, made.fault) == ((), None)
    assert made.receipt_id is not None
    found = await results.get("ada", made.receipt_id)
    assert found.receipt["request"]["image"] == named(WHITE)
    assert await results.find("ada", ABOUT) is None
    with pytest.raises(InvalidRequest, match="not kept"):
        await results.input(found, named(WHITE))
    assert await results.keep_house() == Swept(results=0, objects=0)


async def test_a_picture_that_is_not_to_be_given_again_is_not_stored(results: Results, folder: Folder):
    made = await keep(results, "ada", drawn(), about=None, pictures=False)
    assert made.receipt_id is not None
    assert await stored(folder) == set()
    by_address = await keep(results, "ada", drawn(), about=None, pictures=True)
    assert await stored(folder) == set(by_address.keys)


async def test_a_store_that_is_full_costs_the_pictures_and_not_the_receipt(database: Database, tmp_path: Path):
    folder = Folder(tmp_path / "full", Links(SECRET))
    (tmp_path / "full" / "results").write_text("a file where a folder is to be made")
    results = Results(database, folder, KEEP_S)
    made = await keep(results, "ada", drawn(), about="f", pictures=True)
    assert made.keys == ()
    assert made.fault is not None
    assert made.receipt_id is not None
    assert (await results.get("ada", made.receipt_id)).keys == ()


class Troubled(Results):
    """Whose store is away at first."""

    def __init__(self, database: Database):
        super().__init__(database, None, KEEP_S)
        self.looks = 0

    async def keep_house(self) -> Swept:
        self.looks += 1
        if self.looks == 1:
            raise Unavailable(1.0, "the store is away")
        if self.looks == 2:
            raise InvalidRequest("store", "is another database's too")
        return await super().keep_house()


async def test_the_house_is_kept_again_and_again_also_after_trouble(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job_runner, "HOUSE_S", 0.01)
    kept = Troubled(database)
    keeping = asyncio.create_task(job_runner.keep_house(kept))
    await until(lambda: kept.looks >= 4)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
