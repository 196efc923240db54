"""What a job is to make, as the JSON of its row and back. Pictures are keys of stored objects, with their sizes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from models.images import ImageFormat, Picture
from models.parts import AdapterUse, ControlUse, Hires, Outpaint, Upscale
from models.request import EffectiveRequest

UPSCALE = "upscale"  # the kind of job that enlarges; all others draw

_PARTS: Mapping[str, type[Any]] = {"outpaint": Outpaint, "hires": Hires, "upscale": Upscale}
_LISTS: Mapping[str, type[Any]] = {"controls": ControlUse, "adapters": AdapterUse}


@dataclass(frozen=True, kw_only=True)
class UpscaleRequest:
    """A picture to enlarge. The picture of a request that waits is stored; its pixels are not needed here."""

    image: Picture
    upscale: Upscale
    output_format: ImageFormat


def pictures_of(request: EffectiveRequest) -> dict[str, Picture]:
    """The pictures of a request by field: `image`, `controls.0.image`."""
    given = {"image": request.image, "mask": request.mask}
    given |= {f"controls.{i}.image": use.image for i, use in enumerate(request.controls)}
    return {field: picture for field, picture in given.items() if picture is not None}


def to_json(request: EffectiveRequest | UpscaleRequest, keys: Mapping[str, str]) -> dict[str, Any]:
    """The request as JSON; `keys` says by field under which key each of its pictures is stored."""
    return _plain(request, (), keys)


def keys_of(values: Mapping[str, Any]) -> list[str]:
    """The keys of all pictures in a request's JSON."""
    return list(_keys(values))


def from_json(values: Mapping[str, Any], pictures: Mapping[str, Picture] | None = None) -> EffectiveRequest:
    """The request that `to_json` wrote. Without `pictures`, by key, its pictures have sizes and no pixels."""
    read = {name: _picture(value, pictures) for name, value in values.items()}
    read |= {name: part(**read[name]) for name, part in _PARTS.items() if read.get(name) is not None}
    for name, part in _LISTS.items():
        uses = ({key: _picture(value, pictures) for key, value in use.items()} for use in read[name])
        read[name] = tuple(part(**use) for use in uses)
    return EffectiveRequest(**read)


def upscale_from_json(values: Mapping[str, Any]) -> UpscaleRequest:
    """The same for a picture to enlarge, without its pixels."""
    image = _picture(values["image"], None)
    return UpscaleRequest(image=image, upscale=Upscale(**values["upscale"]), output_format=values["output_format"])


def _plain(value: Any, path: tuple[str, ...], keys: Mapping[str, str]) -> Any:
    if isinstance(value, Picture):
        return {"key": keys[".".join(path)], "width": value.width, "height": value.height}
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), (*path, f.name), keys) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item, (*path, str(i)), keys) for i, item in enumerate(value)]
    return value


def _picture(value: Any, pictures: Mapping[str, Picture] | None) -> Any:
    if not (isinstance(value, dict) and "key" in value):
        return value
    if pictures is None:
        return Picture(width=value["width"], height=value["height"], data=b"")
    return pictures[value["key"]]


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and "key" in value:
        yield value["key"]
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _keys(part)
