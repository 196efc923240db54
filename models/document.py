"""A request as a JSON document, and back. No torch.

What stands in a picture's place is up to whoever writes the document, and so is finding the picture again. What a
request says by default is left out, so a version with a new field writes documents that others can read as long as
nobody uses the field, and the same as before; a default, therefore, never becomes another one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from models.errors import InvalidRequest
from models.images import Picture
from models.parts import AdapterUse, ArmUse, ControlUse, Hires, Outpaint, Upscale
from models.request import EffectiveRequest, GenerationRequest

_PICTURES = ("image", "mask")
_PARTS: dict[str, type[Any]] = {"outpaint": Outpaint, "hires": Hires, "upscale": Upscale}
_OPEN = {field.name: field.default for field in fields(GenerationRequest)}  # an effective request's are placeholders
LATER: Mapping[str, Any] = {"deep_cache": EffectiveRequest.deep_cache}  # what a request of before would have said


def write(value: Any, name: Callable[[Picture], Any], *, whole: bool = False) -> Any:
    """A request, or a part of one, as JSON has it, with `name(picture)` in the place of each picture.

    `whole` has the defaults in it too.
    """
    written = partial(write, name=name, whole=whole)
    if isinstance(value, Picture):
        return name(value)
    if is_dataclass(value):
        defaults = {field.name: field.default for field in fields(value)}
        if isinstance(value, GenerationRequest):
            defaults |= _OPEN | (dict(LATER) if isinstance(value, EffectiveRequest) else {})
        values = {field: getattr(value, field) for field in defaults}
        return {field: written(given) for field, given in values.items() if whole or given != defaults[field]}
    if isinstance(value, tuple | list):
        return [written(item) for item in value]
    return value


def read(document: Mapping[str, Any], found: Callable[[Any], Picture]) -> EffectiveRequest:
    """The request of a document that `write` made; `found` gives the picture for what stands in its place.

    Raises InvalidRequest for a document of a version that knew other fields.
    """
    values = dict(document)
    for field in _PICTURES:
        values[field] = None if values.get(field) is None else found(values[field])
    for field, kind in _PARTS.items():
        values[field] = None if values.get(field) is None else made(kind, values[field], f"{field}.")
    adapters, controls = values.get("adapters", ()), values.get("controls", ())
    values["adapters"] = tuple(made(AdapterUse, use, f"adapters.{i}.") for i, use in enumerate(adapters))
    controls = (use | {"image": found(use["image"])} for use in controls)
    values["controls"] = tuple(made(ControlUse, use, f"controls.{i}.") for i, use in enumerate(controls))
    experiments = enumerate(values.get("experiments", ()))
    values["experiments"] = tuple(made(ArmUse, use, f"experiments.{i}.") for i, use in experiments)
    return made(EffectiveRequest, values)


def made(kind: type[Any], values: Mapping[str, Any], place: str = "") -> Any:
    """The dataclass of these values. Raises InvalidRequest for a field that it has not, named with its place."""
    unknown = sorted(values.keys() - {field.name for field in fields(kind)})
    if unknown:
        raise InvalidRequest(place + unknown[0], "is no field of a request here: another version wrote it")
    return kind(**values)


def pictures(request: EffectiveRequest) -> Iterator[Picture]:
    """The input pictures of a request."""
    given = (request.image, request.mask, *(use.image for use in request.controls))
    return (picture for picture in given if picture is not None)


def names(document: Mapping[str, Any]) -> Iterator[Any]:
    """What stands in the places of a document's pictures."""
    given = (*(document.get(field) for field in _PICTURES), *(use["image"] for use in document.get("controls", ())))
    return (name for name in given if name is not None)
