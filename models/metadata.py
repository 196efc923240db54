"""What a picture says of how it was made: written into it, and read back into the fields of a request. No torch.

Two texts: A1111's infotext under `parameters`, for people and other programs, and JSON under `heliograph`, which is
complete: whatever field a request has is in it by name, input pictures by size and sha256 of their RGB bytes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import orjson

from models import infotext
from models.document import LATER
from models.document import write as plain
from models.images import Picture, inspect
from models.request import EffectiveRequest, GenerationRequest

SOFTWARE = "Heliograph"
# "Created using generative AI", in the words of the IPTC's vocabulary of digital source types.
AI_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# How it was ordered, not what it shows.
_ORDER = ("samples", "priority", "deadline_s", "preview_every", "metadata", "experiments")
_OF_THE_MODEL = ("guidance_input",)  # which `model` says
_MINIMAL = ("model", "seed")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a picture tells: who wrote it, the fields of a request, and what of it could not be taken over."""

    source: Literal["heliograph", "a1111"] | None
    parameters: dict[str, Any]
    infotext: str | None
    format: str
    width: int
    height: int
    warnings: tuple[str, ...]


def write(request: EffectiveRequest, revision: str, metadata: Literal["full", "minimal", "none"]) -> dict[str, str]:
    """The texts for one picture, by keyword, as images.encode takes them; `request` is that of the picture alone.

    `minimal` says that a picture is AI-generated, by which software, model and seed, and nothing of the prompt.
    """
    if metadata == "none":
        return {}
    values = _described(request)
    told = values if metadata == "full" else {name: values[name] for name in _MINIMAL}
    document = {"software": SOFTWARE, "digital_source_type": AI_GENERATED, "revision": revision, "parameters": told}
    if metadata == "full" and request.experiments:
        document["experiments"] = [{"name": use.experiment, "arm": use.arm} for use in request.experiments]
    texts = {"Software": SOFTWARE, "heliograph": orjson.dumps(document).decode()}
    return {"parameters": infotext.compose(values, revision)} | texts if metadata == "full" else texts


def read(encoded: bytes, field: str = "image") -> Metadata:
    """What an encoded picture tells of how it was made; our own JSON counts before an infotext.

    `parameters` holds what a request for the same picture has to say, in the native API's names. Raises InvalidRequest
    naming `field` where there is no readable picture.
    """
    found = inspect(encoded, field)
    text = found.text.get("parameters")
    warnings: list[str] = []
    source, parameters = None, {}
    document = _document(found.text.get("heliograph"), warnings)
    if document is not None:
        source, parameters = "heliograph", _restored(document["parameters"], warnings)
    elif text is not None:
        parsed = infotext.parse(text)
        if parsed is None:
            warnings.append("the text under `parameters` is no infotext of A1111's kind")
        else:
            source, (parameters, left) = "a1111", infotext.fields(parsed)
            warnings += [*left, "another program's noise: the same seed draws another picture here"]
    size = {"width": found.width, "height": found.height}
    return Metadata(
        source=source, parameters=parameters, infotext=text, format=found.format, **size, warnings=tuple(warnings)
    )


def _described(request: EffectiveRequest) -> dict[str, Any]:
    left_out = _ORDER + _OF_THE_MODEL
    values = {name: value for name, value in plain(request, named, whole=True).items() if name not in left_out}
    if request.task in ("txt2img", "upscale"):
        values["denoise_strength"] = None  # what a request without a picture to draw anew must not say
    return values


def named(picture: Picture) -> dict[str, Any]:
    """What stands for an input picture: its size and the SHA-256 of its RGB bytes."""
    return {"width": picture.width, "height": picture.height, "sha256": hashlib.sha256(picture.data).hexdigest()}


def _document(text: str | None, warnings: list[str]) -> dict[str, Any] | None:
    """Our JSON, if that is what it is: anyone can have edited it."""
    if text is None:
        return None
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        document = None
    if isinstance(document, dict) and isinstance(document.get("parameters"), dict):
        return document
    warnings.append("the text under `heliograph` is damaged")
    return None


def _restored(stored: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """What differs from a request that says nothing; pictures are named in the warnings, since only a hash is here."""
    known = {field.name: field for field in fields(GenerationRequest)}
    parameters: dict[str, Any] = {}
    complete = "prompt" in stored
    for name, value in ({**LATER, **stored} if complete else stored).items():
        if name not in known:
            warnings.append(f"`{name}` is left out: there is no such field here")
        elif value is not None and value != plain(known[name].default, named):
            missing = list(_pictures(value, name))
            warnings += [f"`{place}` has to be sent again: {size}" for place, size in missing]
            if not _is_picture(value):
                parameters[name] = _without_pictures(value)
    if not complete:
        warnings.append("the metadata is minimal: it does not say the prompt")
    return parameters


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and "sha256" in value


def _pictures(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Where a value has pictures, and which."""
    if _is_picture(value):
        yield place, f"{value.get('width')}x{value.get('height')}, sha256 {value['sha256']}"
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _pictures(inner, f"{place}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _pictures(inner, f"{place}.{index}")


def _without_pictures(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_pictures(inner) for name, inner in value.items() if not _is_picture(inner)}
    if isinstance(value, list):
        return [_without_pictures(inner) for inner in value]
    return value
