"""From a finished drawing to a kept result, as far as database and store allow: an answer is not lost with them."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.events import Upscaled
from app.results import receipt as receipts
from app.results.receipt import Drawn
from app.results.results import Results, new_id
from models.errors import Unavailable
from models.parts import Upscale


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What has become of a result: its receipt's id, its pictures' keys, and why one of them is missing."""

    receipt_id: str | None = None
    keys: tuple[str, ...] = ()
    fault: Unavailable | None = None


async def keep(results: Results, owner: str, drawn: Drawn, *, about: str | None, pictures: bool) -> Kept:
    """Keeps a receipt with the input pictures it needs, and the pictures where they are to be given out again, to who
    sends a request with the fingerprint `about`, or where `pictures` asks for it."""
    id, keys, fault = new_id(), (), None
    try:
        if results.stores and (about or pictures):
            keys = await results.put(id, drawn.images)
        if results.stores:
            await results.put_inputs(id, drawn.request)
    except Unavailable as full:
        fault = full
    receipt = await asyncio.to_thread(receipts.compose, id, int(time.time()), drawn)
    kept = Kept(receipt_id=id, keys=keys, fault=fault)
    return await _recorded(results, owner, receipt, kept, about if keys else None)


async def keep_enlarged(results: Results, owner: str, enlarged: Upscaled, wanted: Upscale, *, pictures: bool) -> Kept:
    """The same for a picture that was enlarged, which is stored where `pictures` asks for it."""
    id, keys, fault = new_id(), (), None
    try:
        if pictures:
            keys = await results.put(id, [enlarged])
    except Unavailable as full:
        fault = full
    receipt = await asyncio.to_thread(receipts.compose_enlarged, id, int(time.time()), enlarged, wanted)
    return await _recorded(results, owner, receipt, Kept(receipt_id=id, keys=keys, fault=fault))


async def _recorded(
    results: Results, owner: str, receipt: Mapping[str, Any], kept: Kept, about: str | None = None
) -> Kept:
    """What has become of a result whose pictures are stored, once its receipt is written down, or cannot be."""
    try:
        await results.record(owner, receipt, kept.keys, about)
    except Unavailable as away:
        return Kept(fault=away)
    return kept
