"""One module per API that Heliograph speaks. A module's name is its registration.

Each has wire models, `to_request`, `from_result` and `routes(service) -> APIRouter`.
"""

import importlib
import pkgutil
from typing import Protocol, cast

from fastapi import APIRouter

from app.service import Service
from models.errors import NotFound


class Dialect(Protocol):
    """What every module of this package offers the ingress."""

    def routes(self, service: Service) -> APIRouter: ...


def names() -> list[str]:
    """The dialects there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Dialect:
    """The dialect of that name. Raises NotFound listing those there are."""
    if name not in names():
        raise NotFound(f"there is no dialect {name!r}; the dialects are: {', '.join(names())}")
    return cast(Dialect, importlib.import_module(f"{__name__}.{name}"))
