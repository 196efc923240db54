"""The pictures that a request brings: stored when it is submitted, read back when it is its turn.

What is stored is packed anew: no byte of an upload is kept.
"""

import asyncio
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from app.jobs.canonical import keys_of
from app.stores.store import StorageFull, Store
from models import png
from models.decoding import decoded
from models.errors import Unavailable
from models.images import Picture

FOLDER = "inputs"


def new_folder() -> str:
    """A name for the pictures of one request."""
    return uuid.uuid4().hex


async def keep(store: Store, folder: str, pictures: Iterable[Picture]) -> dict[Picture, str]:
    """Stores pictures without loss, and tells the key of each. Raises what the store raises."""
    distinct = list(dict.fromkeys(pictures))
    keys = await keep_packed(store, folder, [await asyncio.to_thread(png.write, p.array()) for p in distinct])
    return dict(zip(distinct, keys, strict=True))


async def keep_packed(store: Store, folder: str, pngs: Sequence[bytes]) -> list[str]:
    """The same for pictures that are PNG already."""
    keys = [f"{FOLDER}/{folder}/{i}" for i in range(len(pngs))]
    try:
        for key, data in zip(keys, pngs, strict=True):
            await store.put(key, data, "image/png")
    except StorageFull:
        await drop(store, keys)
        raise
    return keys


async def drop(store: Store, keys: Iterable[str]) -> None:
    """Deletes pictures of which no job came. What the store does not delete now, its sweep finds."""
    with suppress(Unavailable):
        await asyncio.gather(*(store.delete(key) for key in keys))


async def load(store: Store, request: Mapping[str, Any]) -> dict[str, Picture]:
    """The pictures of a request's JSON, by key. Raises what the store raises."""
    found = {}
    for key in keys_of(request):
        found[key] = await asyncio.to_thread(Picture.from_bytes, await store.get(key))
    return found


def repacked(encoded: bytes, field: str) -> bytes:
    """A picture that somebody sent as a PNG: upright, in sRGB, with its transparency.

    Raises InvalidRequest naming the field.
    """
    with decoded(encoded, field) as (colour, alpha):
        if alpha is not None:
            colour.putalpha(alpha)
        return png.write(np.asarray(colour))
