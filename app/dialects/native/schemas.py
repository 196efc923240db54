"""The endpoints in the OpenAPI documentation: bodies as JSON and as a form, and what comes back."""

from typing import Any

from pydantic import BaseModel

from app.dialects.native.forms import FORM
from models.images import MEDIA_TYPES

JSON = "application/json"
EVENTS = "text/event-stream"
_PICTURES = ("image", "init_image", "mask")
_STATUSES = {
    400: "The body is not JSON, or no form",
    404: "No such model, or nothing else of that name",
    413: "The body is too large",
    422: "A field is wrong; `field` says which",
    429: "Too much work is waiting; see Retry-After",
    503: "No replica could do it just now; send it again",
    504: "Not finished before the deadline",
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The pictures: JSON with base64, or by `Accept` the bytes of one, or by `stream` events",
        "content": {kind: {} for kind in (JSON, EVENTS, *MEDIA_TYPES.values())},
    },
    **{status: {"description": meaning, "content": {JSON: {}}} for status, meaning in _STATUSES.items()},
}


def body_schema(body: type[BaseModel], form: bool) -> dict[str, Any]:
    """What an endpoint takes: JSON, and where it does, a form with the pictures as files."""
    schema = _without_references(body.model_json_schema())
    content = {JSON: {"schema": schema}}
    if form:
        properties = schema["properties"]
        files = {name: _file(properties[name]["description"]) for name in _PICTURES if name in properties}
        content[FORM] = {"schema": schema | {"properties": properties | files}}
    return {"requestBody": {"required": True, "content": content}}


def _file(description: str) -> dict[str, Any]:
    return {"type": "string", "format": "binary", "description": description}


def _without_references(node: Any, definitions: dict[str, Any] | None = None) -> Any:
    """A JSON schema with its `$defs` put where they are referred to: OpenAPI looks for them elsewhere."""
    if isinstance(node, list):
        return [_without_references(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    definitions = node.get("$defs", definitions)
    if "$ref" in node:
        assert definitions is not None
        node = definitions[node["$ref"].rpartition("/")[2]]
    return {key: _without_references(value, definitions) for key, value in node.items() if key != "$defs"}
