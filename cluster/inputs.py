"""The pictures that rows of a batch job name: files in the input's folder, addresses through the guarded fetcher."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app import links
from app.dialects.native import GenerateBody
from app.fetch import Fetcher
from app.links import Link, link_or_text
from app.settings import FetchSettings
from models.errors import InvalidRequest

_FIELDS = ("image", "init_image", "mask")


class Pictures:
    """Reads pictures for rows. May be used by several threads."""

    def __init__(self, folder: Path, fetch: FetchSettings):
        self._folder, self._fetch = folder.resolve(), fetch

    def read(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A row's body with the bytes of each file in the place of its path. Raises InvalidRequest naming the field."""
        read = {field: self._picture(field, body[field]) for field in _FIELDS if field in body}
        if isinstance(controls := body.get("controls"), list):
            read["controls"] = [self._control(i, use) for i, use in enumerate(controls)]
        return {**body, **read}

    def fetched(self, body: GenerateBody) -> GenerateBody:
        """The body with the bytes of each address in its place. Raises InvalidRequest naming the field, Overloaded."""
        return asyncio.run(links.resolved(body, self._fetched))

    async def _fetched(self, addresses: Mapping[str, str]) -> Mapping[str, bytes]:
        if not self._fetch.pictures:
            raise InvalidRequest(next(iter(addresses)), "must be a file: the configuration lets no pictures be fetched")
        return await Fetcher(self._fetch).pictures(addresses)

    def _control(self, index: int, use: Any) -> Any:
        if not isinstance(use, dict) or "image" not in use:
            return use  # which the wire model refuses, and says how it must be
        return use | {"image": self._picture(f"controls.{index}.image", use["image"])}

    def _picture(self, field: str, given: Any) -> Any:
        if not isinstance(given, str) or isinstance(link_or_text(given), Link):
            return given
        try:
            place = (self._folder / given).resolve()
            inside = place.is_relative_to(self._folder) and not Path(given).is_absolute()
            if not inside or not place.is_file():
                raise InvalidRequest(field, "must be a file in the folder of the input, or below it, or an address")
            if place.stat().st_size > self._fetch.max_bytes:
                raise InvalidRequest(field, f"must have at most {self._fetch.max_bytes} bytes")
            return place.read_bytes()
        except (OSError, ValueError) as unreadable:  # ValueError: a NUL in it
            raise InvalidRequest(field, "cannot be read as a file") from unreadable
