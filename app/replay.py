"""A receipt's request drawn again, and whether the same came of it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from app.drawing import GenerationResult
from app.results import receipt as receipts
from app.results.results import Result, Results
from app.service import Service
from models import document
from models.errors import InvalidRequest, NotFound, Unavailable
from models.events import Finished
from models.request import EffectiveRequest


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A picture drawn again; `max_difference` in steps of 255, None where the first one is no longer there."""

    image: Finished
    identical: bool
    max_difference: int | None


@dataclass(frozen=True, kw_only=True)
class Replay:
    """All pictures of a receipt drawn again, and what has changed meanwhile: `revision`, `versions.torch`, `device`."""

    result: GenerationResult
    images: tuple[Replayed, ...]
    changed: tuple[str, ...]


async def replay(service: Service, owner: str, receipt_id: str) -> Replay:
    """Draws it again, whatever is in the cache, and compares pixels.

    Raises NotFound for another owner's receipt, InvalidRequest where input pictures have gone, and what drawing raises.
    """
    results = service.results
    first = await results.get(owner, receipt_id)
    _check(first)
    again = await service.generate(await _request(results, first), cache=False)
    try:
        files: tuple[bytes | None, ...] = await results.files(first) if first.keys else ()
    except (NotFound, Unavailable):
        files = ()
    images = await asyncio.to_thread(_compared, first, files or (None,) * len(again.images), again)
    return Replay(result=again, images=images, changed=_changed(first, again))


def _check(first: Result) -> None:
    """Raises InvalidRequest for what no request draws again."""
    if "revision" not in first.receipt:
        raise InvalidRequest("receipt_id", "is of an enlargement, whose small picture is not kept: enlarge it again")
    if len({image.get("stop_at_step") for image in first.receipt["images"]}) > 1:
        raise InvalidRequest(
            "receipt_id", "is of pictures that were ended at different steps: no one request draws them"
        )


async def _request(results: Results, first: Result) -> EffectiveRequest:
    """The receipt's request, with its pictures. Raises InvalidRequest where they have gone or it cannot be read."""
    told = first.receipt["request"]
    pictures = {name["sha256"]: await results.input(first, name) for name in document.names(told)}
    try:
        return replace(document.read(told, lambda name: pictures[name["sha256"]]), deadline_s=None, experiments=())
    except (InvalidRequest, TypeError, KeyError) as other:
        raise InvalidRequest("receipt_id", "another version wrote this receipt") from other


def _compared(first: Result, files: tuple[bytes | None, ...], again: GenerationResult) -> tuple[Replayed, ...]:
    return tuple(
        _compare(told, file, image)
        for told, file, image in zip(first.receipt["images"], files, again.images, strict=True)
    )


def _compare(told: Mapping[str, Any], file: bytes | None, image: Finished) -> Replayed:
    if receipts.pixels_sha256(image.data) == told["pixels_sha256"]:
        return Replayed(image=image, identical=True, max_difference=0)
    if file is None or not receipts.is_intact(told, file):
        return Replayed(image=image, identical=False, max_difference=None)
    before, after = (receipts.pixels(data).astype(np.int16) for data in (file, image.data))
    return Replayed(image=image, identical=False, max_difference=int(np.abs(before - after).max()))


def _changed(first: Result, again: GenerationResult) -> tuple[str, ...]:
    """The parts of the origin that are others now, `versions.torch` and the like."""
    assert again.origin is not None  # it was drawn
    told = first.receipt
    before = {name: told[name] for name in ("revision", "device", "dtype")}
    after = {name: getattr(again.origin, name) for name in before}
    for part, now in (("versions", again.origin.versions), ("adapters", again.origin.adapters)):
        before |= {f"{part}.{name}": value for name, value in told[part].items()}
        after |= {f"{part}.{name}": value for name, value in now.items()}
    return tuple(name for name in sorted(before | after) if before.get(name) != after.get(name))
