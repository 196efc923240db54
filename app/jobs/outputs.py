"""Finished pictures on their way into the store, and what a job's row says of each."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from app.events import Upscaled
from app.stores.store import LONGEST_EXPIRY_S, Store
from models.events import Finished, Timings
from models.images import MEDIA_TYPES
from models.prompt import PromptReport

FOLDER = "results"


async def keep(store: Store, job_id: str, attempt: int, picture: Finished) -> dict[str, Any]:
    """Stores a picture under its job and attempt, and gives all there is to know of it but its bytes.

    Its `url` is for webhooks, which are written where no store can be asked: good for longer than they are tried.
    Raises what the store raises.
    """
    key = f"{FOLDER}/{job_id}/{attempt}-{picture.index}"
    stored = await store.put(key, picture.data, MEDIA_TYPES[picture.format])
    known = {field.name: getattr(picture, field.name) for field in fields(picture) if field.name != "data"}
    known |= {"timings": vars(picture.timings), "prompts": {name: vars(r) for name, r in picture.prompts.items()}}
    known |= {"warnings": list(picture.warnings), "url": await store.sign(key, LONGEST_EXPIRY_S)}
    return known | {"key": key, "sha256": stored.sha256, "bytes": stored.bytes}


def finished(output: Mapping[str, Any], data: bytes = b"") -> Finished:
    """The picture that `keep` stored, with its bytes where they are at hand."""
    known = (field.name for field in fields(Finished) if field.name != "data")
    values: dict[str, Any] = {name: output[name] for name in known if name in output}  # an older one says less
    values["warnings"] = tuple(values["warnings"])
    values["timings"] = Timings(**values["timings"])
    values["prompts"] = {name: PromptReport(**report) for name, report in values["prompts"].items()}
    return Finished(data=data, **values)


async def keep_upscaled(store: Store, job_id: str, attempt: int, picture: Upscaled) -> dict[str, Any]:
    """The same for a picture that was enlarged."""
    key = f"{FOLDER}/{job_id}/{attempt}-0"
    stored = await store.put(key, picture.data, MEDIA_TYPES[picture.format])
    size = {"width": picture.width, "height": picture.height}
    known = {"index": 0, "seed": None, "format": picture.format, "model": picture.model}
    known |= {"url": await store.sign(key, LONGEST_EXPIRY_S)}
    return known | size | {"key": key, "sha256": stored.sha256, "bytes": stored.bytes}
