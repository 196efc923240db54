"""A request as a JSON document, and back. No torch.

What stands in a picture's place is up to whoever writes the document, and so is finding the picture again.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from models.errors import InvalidRequest
from models.images import Picture
from models.parts import AdapterUse, ControlUse, Hires, Outpaint, Upscale
from models.request import EffectiveRequest

_PICTURES = ("image", "mask")
_PARTS: dict[str, Callable[..., Any]] = {"outpaint": Outpaint, "hires": Hires, "upscale": Upscale}


def write(value: Any, name: Callable[[Picture], Any]) -> Any:
    """A request, or a part of one, as JSON has it, with `name(picture)` in the place of each picture."""
    if isinstance(value, Picture):
        return name(value)
    if is_dataclass(value):
        return {field.name: write(getattr(value, field.name), name) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [write(item, name) for item in value]
    return value


def read(document: Mapping[str, Any], found: Callable[[Any], Picture]) -> EffectiveRequest:
    """The request of a document that `write` made; `found` gives the picture for what stands in its place.

    Raises InvalidRequest for a document of a version that knew other fields.
    """
    values = dict(document)
    unknown = sorted(values.keys() - {field.name for field in fields(EffectiveRequest)})
    if unknown:
        raise InvalidRequest(unknown[0], "is no field of a request here: another version wrote it")
    for field in _PICTURES:
        values[field] = None if values.get(field) is None else found(values[field])
    for field, part in _PARTS.items():
        values[field] = None if values.get(field) is None else part(**values[field])
    values["adapters"] = tuple(AdapterUse(**use) for use in values.get("adapters", ()))
    controls = values.get("controls", ())
    values["controls"] = tuple(ControlUse(**use | {"image": found(use["image"])}) for use in controls)
    return EffectiveRequest(**values)


def pictures(request: EffectiveRequest) -> Iterator[Picture]:
    """The input pictures of a request."""
    given = (request.image, request.mask, *(use.image for use in request.controls))
    return (picture for picture in given if picture is not None)


def names(document: Mapping[str, Any]) -> Iterator[Any]:
    """What stands in the places of a document's pictures."""
    given = (*(document.get(field) for field in _PICTURES), *(use["image"] for use in document.get("controls", ())))
    return (name for name in given if name is not None)
