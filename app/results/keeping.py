"""From a finished drawing to a kept result, as far as database and store allow: an answer is not lost with them."""

import asyncio
from dataclasses import dataclass

from app.cache import fingerprint
from app.results.receipt import Drawn
from app.results.results import Results, new_id
from models.errors import Unavailable


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What has become of a result: its receipt's id, its pictures' keys, and why one of them is missing."""

    receipt_id: str | None = None
    keys: tuple[str, ...] = ()
    fault: Unavailable | None = None


async def keep(results: Results, owner: str, drawn: Drawn, *, again: bool, pictures: bool) -> Kept:
    """Keeps a receipt with the input pictures it needs, and the pictures where they are to be given out `again`, to who
    sends the same request, or where `pictures` asks for it."""
    id, keys, fault = new_id(), (), None
    try:
        if results.stores and (again or pictures):
            keys = await results.put(id, drawn)
        if results.stores:
            await results.put_inputs(id, drawn.request)
    except Unavailable as full:
        fault = full
    about = await asyncio.to_thread(fingerprint, drawn.request, drawn.origin) if again and keys else None
    try:
        await results.record(id, owner, drawn, keys, about)
    except Unavailable as away:
        return Kept(fault=away)
    return Kept(receipt_id=id, keys=keys, fault=fault)
