"""What a job is to make, as the JSON of its row and back. Pictures are keys of stored objects, with their sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models import document
from models.images import ImageFormat, Picture
from models.parts import Upscale
from models.request import EffectiveRequest

UPSCALE = "upscale"  # the kind of job that an upscaler enlarges for, or a model, which draws


@dataclass(frozen=True, kw_only=True)
class UpscaleRequest:
    """A picture to enlarge, by its key in the store: it is sent on as it is there, transparency included."""

    key: str
    upscale: Upscale
    output_format: ImageFormat


def to_json(request: EffectiveRequest, keys: Mapping[Picture, str]) -> dict[str, Any]:
    """The request as JSON; `keys` says where each of its pictures is stored."""
    return document.write(request, lambda p: {"key": keys[p], "width": p.width, "height": p.height})


def from_json(values: Mapping[str, Any], found: Callable[[str], Picture] | None = None) -> EffectiveRequest:
    """The request that `to_json` wrote. `found` gives a picture by its key; without it pictures have no pixels.

    Raises InvalidRequest for a request that another version wrote.
    """

    def picture(named: Mapping[str, Any]) -> Picture:
        return found(named["key"]) if found else Picture(width=named["width"], height=named["height"], data=b"")

    return document.read(values, picture)


def is_upscale(values: Mapping[str, Any]) -> bool:
    """Whether it is a picture to enlarge, and no request to draw."""
    return "key" in values


def upscale_to_json(request: UpscaleRequest) -> dict[str, Any]:
    """The same for a picture to enlarge, which is a key already."""
    return document.write(request, lambda _: None)


def upscale_from_json(values: Mapping[str, Any]) -> UpscaleRequest:
    """The request that `upscale_to_json` wrote. Raises the same."""
    upscale = document.made(Upscale, values["upscale"], "upscale.")
    return document.made(UpscaleRequest, {**values, "upscale": upscale})


def keys_of(values: Mapping[str, Any]) -> list[str]:
    """The keys of all pictures in a request's JSON, each once."""
    return list(dict.fromkeys(named["key"] for named in document.names(values)))
