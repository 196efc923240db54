"""Forms with files (multipart/form-data, RFC 7578) as the wire models that JSON makes.

Text is taken as it stands, and so are the words that a field takes besides `true` and `false`; every other field is
written as in JSON: `20`, `0.45`, `true`, `{"scale": 2}`. A file takes the place of a base64 text, and the picture of
control n is the file `control_image_n`.
"""

import re
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import orjson
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from starlette.requests import Request

from app import wire
from models.errors import InvalidRequest

FORM = "multipart/form-data"
Body = TypeVar("Body", bound=BaseModel)
_CONTROL_IMAGE = re.compile(r"control_image_(\d{1,2})", re.ASCII)


async def read(request: Request, body: type[Body]) -> Body:
    """The request's body as a wire model: a form where the content type says so, else JSON.

    Raises MalformedBody, BodyTooLarge, and InvalidRequest naming the field.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        return await wire.read_json(request, body)
    fields, files = await wire.read_multipart(request)
    return wire.validate(from_form(fields, files, body), body)


def from_form(fields: dict[str, str], files: dict[str, list[bytes]], body: type[BaseModel]) -> dict[str, Any]:
    """What JSON would have held, with bytes for its pictures. Raises InvalidRequest naming the field."""
    fields_by_name = {field.alias or name: field for name, field in body.model_fields.items()}
    written_as_json = {name for name, text in fields.items() if _is_json(fields_by_name.get(name), text)}
    values = {name: _parsed(name, text) if name in written_as_json else text for name, text in fields.items()}
    for name, uploads in files.items():
        place, key = _place(name, values)
        if len(uploads) > 1 or key in place:
            raise InvalidRequest(name, "is given more than once")
        place[key] = uploads[0]
    return values


def _is_json(field: FieldInfo | None, text: str) -> bool:
    """Whether the text of a field is to be read as JSON. What a field that nobody knows says does not matter."""
    if field is None:
        return False
    return not _is_text(field.annotation) or (bool in get_args(field.annotation) and text in ("true", "false"))


def _is_text(kind: Any) -> bool:
    """Whether a field of that type takes a text (a picture does: base64)."""
    if get_origin(kind) in (Union, UnionType):
        return any(_is_text(choice) for choice in get_args(kind))
    if get_origin(kind) is Annotated:
        return _is_text(get_args(kind)[0])
    return kind is str or get_origin(kind) is Literal


def _parsed(name: str, text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as malformed:
        raise InvalidRequest(name, f"must be written as in JSON, not {text[:40]!r}") from malformed


def _place(name: str, values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Where a file belongs: the dictionary, and the key in it."""
    match = _CONTROL_IMAGE.fullmatch(name)
    if match is None:
        return values, name
    controls, index = values.get("controls"), int(match[1])
    if not isinstance(controls, list) or index >= len(controls) or not isinstance(controls[index], dict):
        raise InvalidRequest(name, f"belongs to entry {index} of `controls`, which is not there")
    return controls[index], "image"
