"""Who asks. Known to the guard of the routes, to budgets, and to whatever is owned by somebody."""

from contextvars import ContextVar
from dataclasses import dataclass, fields

from models.errors import InvalidRequest

# generate: have pictures made; jobs: see and end one's own jobs; admin: with `jobs`, everybody's.
SCOPES = ("generate", "jobs", "admin")
LIMIT_AT_MOST = 10**15


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a caller may have; None is no limit.

    A pixel-step is one step of one pixel: a picture of 512x512 in 20 steps has 5,242,880.
    """

    requests_per_minute: int | None = None
    pixel_steps_per_minute: int | None = None
    concurrent_jobs: int | None = None

    def check(self) -> None:
        """Raises InvalidRequest for a limit that is out of range."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 1 <= value <= LIMIT_AT_MOST:
                raise InvalidRequest(field.name, f"must be between 1 and {LIMIT_AT_MOST}, not {value}")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Somebody with a key. The id stays when the key is rotated: things are owned by it."""

    id: str
    name: str
    scopes: frozenset[str]
    limits: Limits


ANONYMOUS = Caller(id="anonymous", name="anonymous", scopes=frozenset(SCOPES), limits=Limits())

# Whose work is being done. Work that nobody asked for, such as the warm-up picture, is anonymous.
current: ContextVar[Caller] = ContextVar("current", default=ANONYMOUS)
