"""The pictures that a request brings: stored when it is submitted, read back when it is its turn.

What is stored is packed anew: no byte of an upload is kept.
"""

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.jobs.canonical import keys_of
from app.stores.store import Store
from models import png
from models.decoding import decoded
from models.images import Picture

FOLDER = "inputs"


@dataclass(frozen=True)
class Kept:
    """A request's pictures in the store: the folder that is theirs, None where there are none; the keys by field."""

    folder: str | None
    keys: Mapping[str, str]


async def keep(store: Store, pictures: Mapping[str, Picture]) -> Kept:
    """Stores a request's pictures, by field, without loss. Raises what the store raises."""
    packed = {field: await asyncio.to_thread(png.write, picture.array()) for field, picture in pictures.items()}
    return await keep_packed(store, packed)


async def keep_packed(store: Store, packed: Mapping[str, bytes]) -> Kept:
    """The same for pictures that are PNG already."""
    folder = uuid.uuid4().hex
    keys = {field: f"{FOLDER}/{folder}/{i}" for i, field in enumerate(packed)}
    for field, data in packed.items():
        await store.put(keys[field], data, "image/png")
    return Kept(folder if keys else None, keys)


async def load(store: Store, request: Mapping[str, Any]) -> dict[str, Picture]:
    """The pictures of a request's JSON, by key. Raises what the store raises."""
    found = {}
    for key in keys_of(request):
        found[key] = await asyncio.to_thread(Picture.from_bytes, await store.get(key))
    return found


def repacked(encoded: bytes, field: str) -> tuple[Picture, bytes]:
    """A picture that somebody sent as a PNG, upright, in sRGB, with its transparency; and its size without pixels.

    Raises InvalidRequest naming the field.
    """
    with decoded(encoded, field) as (colour, alpha):
        if alpha is not None:
            colour.putalpha(alpha)
        return Picture(width=colour.width, height=colour.height, data=b""), png.write(np.asarray(colour))
