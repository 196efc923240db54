"""Deletes stored objects that nobody owns: what a crash left between storing a picture and writing down whose it is.

To a database that is not the one of a store, everything in that is without an owner. So each leaves its mark in its
store, `heliograph/<its id>`, and what another one has marked is not swept.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from app.stores.store import Store
from models.errors import InvalidRequest

# Longer than any request may take from storing its first picture to the end of the transaction that owns it.
GRACE_S = 24 * 3600.0
ASKED_AT_ONCE = 500
KNOWN_TIMEOUT_S = 60.0
MARKS = "heliograph"

Known = Callable[[list[str]], Awaitable[set[str]]]


async def sweep(store: Store, known: Known, grace_s: float = GRACE_S) -> int:
    """Deletes what is older than the grace and has no owner, and tells how many objects that were.

    `known` tells which of some keys have an owner's row. Younger objects are left alone, because their rows may still
    be on their way. Raises StoreUnavailable, TimeoutError, and whatever `known` raises; what is left over is for the
    next sweep.
    """
    deleted = 0
    async for keys in _batches(store.list(grace_s)):
        async with asyncio.timeout(KNOWN_TIMEOUT_S):
            owned = await known(keys)
        for key in keys:
            if key not in owned:
                await store.delete(key)
                deleted += 1
    return deleted


async def mark(store: Store, database: str) -> None:
    """Leaves a database's mark in a store, where it may be already."""
    await store.put(f"{MARKS}/{database}", b"{}", "application/json")


async def may_sweep(store: Store, database: str, knows: bool, grace_s: float = GRACE_S) -> bool:
    """Whether the store is one database's alone: its mark has stood there for the grace, and no other one does.

    The mark is made where it is missing. For as long as the grace others that keep pictures there have time to make
    theirs. Raises InvalidRequest where one has, and where there is no mark of a database that `knows` of no picture
    while the store holds some.
    """
    mine = f"{MARKS}/{database}"
    marks = {key async for key in store.list(-GRACE_S, MARKS)}
    others = sorted(marks - {mine})
    if mine not in marks:
        if not knows and await _holds_anything(store):
            raise InvalidRequest(
                "store",
                "holds what this database knows nothing of; nothing was swept. Check `database` and `store`: they are "
                "not of one server, or the database is new, and the store has to be too",
            )
        await mark(store, database)
    if others:
        raise InvalidRequest(
            "store",
            f"is another database's too, which has left {', '.join(others)} there; nothing was swept. Give each one a "
            "bucket, a prefix or a folder of its own, or delete the mark of one that is no more",
        )
    return mine in {key async for key in store.list(grace_s, MARKS)}


async def _holds_anything(store: Store) -> bool:
    async for _ in store.list(-GRACE_S):
        return True
    return False


async def _batches(keys: AsyncIterator[str]) -> AsyncIterator[list[str]]:
    batch: list[str] = []
    async for key in keys:
        batch.append(key)
        if len(batch) == ASKED_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
