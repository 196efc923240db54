"""The results in the database and their pictures in the store: kept, found, given by address, and swept.

Everything of a result is stored under `results/<its id>/`: a picture drawn by its number, an input picture by the hash
of its pixels. So whatever lies there has an owner for as long as there is a row of that id. Jobs keep theirs in
the same store; the sweep asks for them.
"""

import asyncio
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app import stores
from app.database import Database, clock, one_at_a_time
from app.events import Upscaled
from app.jobs.inputs import FOLDER as INPUTS
from app.jobs.store import JobStore
from app.jobs.tables import jobs
from app.results.table import places, results
from app.settings import GatewaySettings, RunnerSettings
from app.stores.store import Store, StoreUnavailable
from app.stores.sweep import mark, may_sweep, sweep
from models import document, images
from models.errors import InvalidRequest, NotFound, Unavailable
from models.events import Finished
from models.images import MEDIA_TYPES, Picture
from models.metadata import named
from models.request import EffectiveRequest

ADDRESS_S = 3600.0
PATIENCE_S = 30.0  # for the store, before an answer goes out without it
PRUNED_AT_ONCE = 200
FOLDER = "results"
_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result that is kept; `keys` are those of its pictures in the store, none where they were not stored."""

    id: str
    receipt: Mapping[str, Any]
    keys: tuple[str, ...]
    expires_s: float  # from now


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What was removed: results whose time was over, and stored objects without an owner."""

    results: int
    objects: int


class Results:
    """The results of all callers, each for its owner's eyes alone.

    Every method raises Unavailable where the database or the store is away.
    """

    def __init__(self, database: Database, store: Store | None, keep_s: float):
        self._database, self._store, self._keep_s = database, store, keep_s
        self._jobs = JobStore(database)  # whose pictures lie in the same store

    @property
    def stores(self) -> bool:
        """Whether pictures can be kept."""
        return self._store is not None

    async def put(self, id: str, pictures: Sequence[Finished | Upscaled]) -> tuple[str, ...]:
        """Stores the pictures of a result that is not recorded yet, and gives their keys. Raises StorageFull too."""
        files = {f"{FOLDER}/{id}/{n}": (one.data, MEDIA_TYPES[one.format]) for n, one in enumerate(pictures)}
        await self._put(files)
        return tuple(files)

    async def put_inputs(self, id: str, request: EffectiveRequest) -> None:
        """Stores the input pictures of a result that is not recorded yet. Raises StorageFull too."""
        files = await asyncio.to_thread(_inputs, request)
        await self._put({f"{FOLDER}/{id}/{name}": (data, MEDIA_TYPES["png"]) for name, data in files.items()})

    async def record(
        self, owner: str, receipt: Mapping[str, Any], keys: tuple[str, ...] = (), fingerprint: str | None = None
    ) -> None:
        """Writes a receipt down. By the fingerprint `find` gives out the pictures again, whose keys are given then."""

        async def work(connection: AsyncConnection) -> None:
            now = await clock(connection)
            values = {"id": receipt["receipt_id"], "owner": owner, "fingerprint": fingerprint, "receipt": receipt}
            placed = [image | {"key": key} for image, key in zip(receipt["images"], keys, strict=True)] if keys else []
            values |= {"images": placed, "created_at": now, "expires_at": now + self._keep_s}
            await connection.execute(insert(results).values(values))

        await self._database.write(work)

    async def find(self, owner: str, fingerprint: str) -> Result | None:
        """The newest result of an owner with that fingerprint, while addresses of its pictures have all their time."""
        if self._store is None:
            return None
        mine = (results.c.owner == owner) & (results.c.fingerprint == fingerprint)
        newest = select(results).where(mine).order_by(results.c.created_at.desc()).limit(1)
        found = await self._database.read(lambda connection: _one(connection, newest))
        return found if found is not None and found.expires_s >= ADDRESS_S else None

    async def get(self, owner: str, id: str) -> Result:
        """A result of an owner's. Raises NotFound."""
        wanted = select(results).where((results.c.id == id) & (results.c.owner == owner))
        found = await self._database.read(lambda c: _one(c, wanted)) if _ID.fullmatch(id) else None
        if found is None:
            raise NotFound(f"there is no receipt {id[:64]!r}; it may be over its time")
        return found

    async def files(self, result: Result) -> tuple[bytes, ...]:
        """The stored pictures. Raises NotFound where one has gone."""
        return tuple(await asyncio.gather(*(self._store_or_refuse().get(key) for key in result.keys)))

    async def input(self, result: Result, name: Mapping[str, Any]) -> Picture:
        """The input picture that stands in the receipt's request like that. Raises InvalidRequest where it has gone, or
        was never kept."""
        if self._store is None:
            raise InvalidRequest("receipt_id", "its input pictures are not kept: this server has no `store`")
        try:
            packed = await self._store.get(f"{FOLDER}/{result.id}/{name['sha256']}")
        except NotFound as gone:
            raise InvalidRequest("receipt_id", "its input pictures are no longer kept") from gone
        return await asyncio.to_thread(Picture.from_bytes, packed)

    async def addresses(self, keys: tuple[str, ...], lasts_s: float = ADDRESS_S) -> tuple[str, ...]:
        """Addresses of stored pictures, each good for an hour at most. Raises NotFound where one has gone."""
        store, seconds = self._store_or_refuse(), int(max(1, min(lasts_s, ADDRESS_S)))
        return tuple(await asyncio.gather(*(store.url(key, seconds) for key in keys)))

    async def mark(self) -> None:
        """Says in the store that this database keeps pictures there, so that no other one sweeps them."""
        if self._store is not None:
            id, _ = await self._database.write(_identity)
            await mark(self._store, id)

    async def keep_house(self) -> Swept:
        """Removes results whose time is over, and what lies in the store without an owner. For a loop, every hour or
        so; several may run at once.

        Raises InvalidRequest where the store is not this database's alone: then nothing in it is without an owner.
        """
        id, knows = await self._database.write(_identity)
        gone = 0
        while pruned := await self._prune():
            gone += pruned
        ours = self._store is not None and await may_sweep(self._store, id, knows)
        return Swept(results=gone, objects=await sweep(self._store_or_refuse(), self._owned) if ours else 0)

    async def _prune(self) -> int:
        """Rows first: what a crash leaves behind then has no owner, and the sweep finds it."""

        async def work(connection: AsyncConnection) -> Sequence[Row[Any, Any, Any]]:
            over = select(results.c.id).where(results.c.expires_at <= await clock(connection)).limit(PRUNED_AT_ONCE)
            removed = delete(results).where(results.c.id.in_(over))
            told = removed.returning(results.c.id, results.c.images, results.c.receipt)
            return (await connection.execute(told)).all()

        removed = await self._database.write(work)
        for row in removed:
            await self._delete([image["key"] for image in row.images])
            inputs = document.names(row.receipt["request"])
            await self._delete([f"{FOLDER}/{row.id}/{name['sha256']}" for name in inputs])
        return len(removed)

    async def _delete(self, keys: list[str]) -> None:
        if self._store is not None:
            await asyncio.gather(*(self._store.delete(key) for key in keys))

    async def _owned(self, keys: list[str]) -> set[str]:
        """Those whose result or job is there; and all that lie elsewhere, of which nothing is known here."""
        ours = [key for key in keys if key.startswith((f"{FOLDER}/", f"{INPUTS}/")) and key.count("/") == 2]
        ids = {key: key.split("/")[1] for key in ours if key.startswith(f"{FOLDER}/")}
        there = select(results.c.id).where(results.c.id.in_(set(ids.values())))

        async def work(connection: AsyncConnection) -> set[str]:
            return set(await connection.scalars(there))

        of_jobs, alive = await self._jobs.known(ours), await self._database.read(work)
        return {key for key in keys if key not in ours or key in of_jobs or ids.get(key) in alive}

    async def _put(self, files: Mapping[str, tuple[bytes, str]]) -> None:
        store = self._store_or_refuse()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*(store.put(key, data, kind) for key, (data, kind) in files.items()))
        except TimeoutError as late:
            raise StoreUnavailable(message=f"the store for pictures took over {PATIENCE_S:.0f} s") from late

    def _store_or_refuse(self) -> Store:
        if self._store is None:
            raise Unavailable(60.0, "this server keeps no pictures")
        return self._store


def opened(settings: GatewaySettings | RunnerSettings, database: Database) -> Results:
    """The results of a configuration: receipts in the database, pictures in the store where there is one."""
    secret = stores.signing_secret(settings.secret_file)
    store = None if settings.store is None else stores.opened(settings.store, secret)
    return Results(database, store, settings.keep_results_s)


def new_id() -> str:
    return uuid.uuid4().hex


def _inputs(request: EffectiveRequest) -> dict[str, bytes]:
    """The input pictures without loss, by the hash of their pixels."""
    return {named(one)["sha256"]: images.encode(one.array(), "png") for one in document.pictures(request)}


async def _identity(connection: AsyncConnection) -> tuple[str, bool]:
    """The database's id, and whether it knows of any result or job."""
    await one_at_a_time(connection, "identity")
    id = await connection.scalar(select(places.c.id))
    if id is None:
        id = new_id()
        await connection.execute(insert(places).values(id=id))
    known = select(results.c.id).exists() | select(jobs.c.id).exists()
    return id, bool(await connection.scalar(select(known)))


async def _one(connection: AsyncConnection, query: Any) -> Result | None:
    row = (await connection.execute(query)).one_or_none()
    left_s = 0.0 if row is None else row.expires_at - await clock(connection)
    if row is None or left_s <= 0:
        return None
    keys = tuple(image["key"] for image in row.images)
    return Result(id=row.id, receipt=row.receipt, keys=keys, expires_s=left_s)
