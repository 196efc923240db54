"""The receipt of a generation: all that is needed to draw it again, and to tell whether it came out the same."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from app.events import Upscaled
from app.origin import Origin
from models import document
from models.errors import InvalidRequest, NotFound
from models.events import Finished, Timings
from models.images import Picture
from models.metadata import named
from models.parts import Upscale
from models.prompt import PromptReport
from models.request import EffectiveRequest

_AT_ONCE = Timings(queued_s=0.0, encode_s=0.0, denoise_s=0.0, decode_s=0.0)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What came of a request: its pictures in order, and the origin of the replica that drew them."""

    request: EffectiveRequest
    origin: Origin
    images: tuple[Finished, ...]


def compose(id: str, created: int, drawn: Drawn) -> dict[str, Any]:
    """The receipt, as JSON. Input pictures are in it by size and SHA-256 of their RGB bytes; of each picture drawn the
    SHA-256 of its file (`sha256`) and of its RGB bytes (`pixels_sha256`). Decodes the pictures: not for an event loop.
    """
    origin = drawn.origin
    return {
        "receipt_id": id,
        "created": created,
        "model": drawn.request.model,
        "revision": origin.revision,
        "adapters": dict(origin.adapters),
        "device": origin.device,
        "dtype": origin.dtype,
        "versions": dict(origin.versions),
        "request": document.write(drawn.request, named),
        "images": [_described(image) for image in drawn.images],
        "prompts": {field: asdict(report) for field, report in drawn.images[0].prompts.items()},
        "warnings": list(dict.fromkeys(warning for image in drawn.images for warning in image.warnings)),
    }


def compose_enlarged(id: str, created: int, enlarged: Upscaled, wanted: Upscale) -> dict[str, Any]:
    """The receipt of an enlargement. It has no `revision`, and cannot be replayed: the small picture is not kept."""
    return {
        "receipt_id": id,
        "created": created,
        "model": enlarged.model,
        "request": {"scale": wanted.scale, "output_format": enlarged.format},
        "images": [{"index": 0} | _file(enlarged)],
    }


def images(receipt: Mapping[str, Any], files: Sequence[bytes]) -> tuple[Finished, ...]:
    """The pictures of a receipt as an engine would give them that takes no time, with the bytes of their files.

    Hashes the files: not for an event loop. Raises NotFound where a file is not the one that was kept, InvalidRequest
    for a receipt that another version wrote.
    """
    try:
        damaged = [not is_intact(image, data) for image, data in zip(receipt["images"], files, strict=True)]
        if any(damaged):
            raise NotFound(f"picture {damaged.index(True)} of receipt {receipt['receipt_id']} is damaged")
        return _images(receipt, files)
    except (TypeError, KeyError, ValueError) as other:
        raise InvalidRequest("receipt_id", "another version wrote this receipt") from other


def is_intact(image: Mapping[str, Any], data: bytes) -> bool:
    """Whether a file is the one that stands in a receipt's entry."""
    return hashlib.sha256(data).hexdigest() == image["sha256"]


def _images(receipt: Mapping[str, Any], files: Sequence[bytes]) -> tuple[Finished, ...]:
    prompts = {field: PromptReport(**report) for field, report in receipt["prompts"].items()}
    return tuple(
        Finished(
            index=image["index"],
            seed=image["seed"],
            data=data,
            format=image["format"],
            width=image["width"],
            height=image["height"],
            revision=receipt["revision"],
            timings=_AT_ONCE,
            prompts=prompts,
            warnings=tuple(receipt["warnings"]),
        )
        for image, data in zip(receipt["images"], files, strict=True)
    )


def pixels(encoded: bytes) -> np.ndarray:
    """A picture of ours as uint8 (height, width, 3)."""
    return Picture.from_bytes(encoded).array()


def pixels_sha256(encoded: bytes) -> str:
    """Of the RGB bytes, rows from the top: the same for any file with the same pixels."""
    return hashlib.sha256(pixels(encoded).tobytes()).hexdigest()


def _described(image: Finished) -> dict[str, Any]:
    ended = {} if image.stop_at_step is None else {"stop_at_step": image.stop_at_step}
    return {"index": image.index, "seed": image.seed} | ended | _file(image)


def _file(image: Finished | Upscaled) -> dict[str, Any]:
    return {
        "format": image.format,
        "width": image.width,
        "height": image.height,
        "bytes": len(image.data),
        "sha256": hashlib.sha256(image.data).hexdigest(),
        "pixels_sha256": pixels_sha256(image.data),
    }
