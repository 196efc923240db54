"""The lines of a batch's file: bodies of `POST /v1/generate`, as they are or in the shape of OpenAI's Batch API.

That shape is `{"custom_id", "method", "url", "body"}`, with the url of this API or that of OpenAI's images.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

import orjson
from pydantic import Field

from app import links, wire
from app.dialects.native.bodies import GenerateBody, OutputFormat, Wire, within
from app.dialects.native.requests import canonical, to_request
from app.errors import MalformedBody
from app.jobs.batching import naming
from app.jobs.service import Delivery
from models import limits
from models.errors import InvalidRequest
from models.request import GenerationRequest

GENERATE, IMAGES = "/v1/generate", "/v1/images/generations"
Asked = tuple[str, str, GenerationRequest, Delivery]  # custom_id, url, what to draw, how to answer

_NOT_IN_A_LINE = ("async", "webhook_url", "webhook_events", "stream", "preview_every")
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


class Envelope(Wire):
    """A line in OpenAI's shape."""

    custom_id: str = Field(min_length=1, max_length=512, pattern=r"^[^\x00]*$")  # which PostgreSQL does not keep
    method: Literal["POST"]
    url: Literal["/v1/generate", "/v1/images/generations"]
    body: dict[str, Any]


class ImagesBody(Wire):
    """What is taken of OpenAI's body for images."""

    prompt: str
    model: str | None = None
    n: int | None = within(limits.SAMPLES, "How many pictures; 1 when left out")
    size: str | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: OutputFormat | None = None


def read(file: bytes, default_model: str, most: int) -> list[Asked]:
    """The lines of a file, empty ones left out. Decodes pictures: not for an event loop.

    Raises InvalidRequest naming the first line that is wrong, from 1, and MalformedBody for a file without lines.
    """
    lines = [line for line in file.splitlines() if line.strip()]
    if not 1 <= len(lines) <= most:
        raise MalformedBody("body", f"must have 1 to {most} lines, each a JSON object, not {len(lines)}")
    return list(_unique(_read(number, line, default_model) for number, line in enumerate(lines, 1)))


def _unique(lines: Iterator[Asked]) -> Iterator[Asked]:
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if line[0] in seen:
            raise InvalidRequest(f"lines.{number}.custom_id", f"is that of line {seen[line[0]]}, too")
        seen[line[0]] = number
        yield line


def _read(number: int, line: bytes, default_model: str) -> Asked:
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as malformed:
        raise InvalidRequest(f"lines.{number}", f"is not valid JSON: {malformed}") from malformed
    if not isinstance(values, dict):
        raise InvalidRequest(f"lines.{number}", "must be a JSON object")
    with naming(number):
        if "body" not in values:  # which no request has
            return (f"line-{number}", GENERATE, *_generate(values, default_model))
        envelope = wire.validate(values, Envelope)
        convert = _images if envelope.url == IMAGES else _generate
        return (envelope.custom_id, envelope.url, *convert(envelope.body, default_model))


def _generate(values: dict[str, Any], default_model: str) -> tuple[GenerationRequest, Delivery]:
    for field in _NOT_IN_A_LINE:
        if field in values:
            raise InvalidRequest(field, "has no meaning in a line of a batch")
    if values.get("priority", "batch") != "batch":
        raise InvalidRequest("priority", "must be batch, or left out, in a line of a batch")
    body = wire.validate(values | {"priority": "batch"}, GenerateBody)
    for field in links.found(body):
        raise InvalidRequest(field, "must be base64 in a line of a batch, which may have thousands of them")
    return to_request(body, default_model), Delivery(response=body.response or "url", cache=body.cache)


def _images(values: dict[str, Any], default_model: str) -> tuple[GenerationRequest, Delivery]:
    body = wire.validate(values, ImagesBody)
    width, height = _size(body.size)
    samples = 1 if body.n is None else body.n
    limits.SAMPLES.check("n", samples)
    request = GenerationRequest(
        model=body.model or default_model,
        prompt=body.prompt,
        width=width,
        height=height,
        samples=samples,
        output_format=canonical(body.output_format),
        priority="batch",
    )
    return request, Delivery(response="base64" if body.response_format == "b64_json" else "url")


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size in (None, "auto"):
        return None, None
    found = _SIZE.fullmatch(size or "")
    if found is None:
        raise InvalidRequest("size", f"must be auto or WIDTHxHEIGHT, such as 512x512, not {size!r}")
    return int(found[1]), int(found[2])
