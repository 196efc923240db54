"""Pictures that a body gives by address: found wherever they stand, and replaced by what is there."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

Body = TypeVar("Body", bound=BaseModel)
Fetch = Callable[[Mapping[str, str]], Awaitable[Mapping[str, bytes]]]  # addresses by field to pictures by field


class Link(str):
    """An http or https address in a picture's place."""


def link_or_text(value: str) -> str:
    """A picture's text as a Link where it is one; anything else as it stands."""
    return Link(value) if value[:8].lower().startswith(("http://", "https://")) else value


def found(body: BaseModel) -> dict[str, str]:
    """The links of a body, by the names of their fields: `image`, `controls.0.image`."""
    return dict(_links(body, ()))


async def resolved(body: Body, fetch: Fetch) -> Body:
    """The body with every Link replaced by the bytes that it leads to. Raises what `fetch` raises."""
    links = found(body)
    return _replaced(body, await fetch(links), ()) if links else body


def _links(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Link):
        yield _name(path), str(value)
    for key, part in _parts(value):
        yield from _links(part, (*path, key))


def _replaced(value: Any, pictures: Mapping[str, bytes], path: tuple[Any, ...]) -> Any:
    if isinstance(value, Link):
        return pictures[_name(path)]
    parts = {key: _replaced(part, pictures, (*path, key)) for key, part in _parts(value)}
    if isinstance(value, BaseModel):
        return value.model_copy(update={key: new for key, new in parts.items() if new is not getattr(value, key)})
    return list(parts.values()) if isinstance(value, list) else value


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, BaseModel):
        yield from value
    elif isinstance(value, list):
        yield from enumerate(value)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
