"""Deletes stored objects that nobody owns: what a crash left between storing a picture and writing down whose it is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from app.stores.store import Store

# Longer than any request may take from storing its first picture to the end of the transaction that owns it.
GRACE_S = 24 * 3600.0
ASKED_AT_ONCE = 500
KNOWN_TIMEOUT_S = 60.0

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


async def _batches(keys: AsyncIterator[str]) -> AsyncIterator[list[str]]:
    batch: list[str] = []
    async for key in keys:
        batch.append(key)
        if len(batch) == ASKED_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
