"""The API keys in the database: made, rotated, revoked, listed, and recognised."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app import secret
from app.database import Database, clock
from app.errors import Unauthenticated
from app.keys import secrets
from app.keys.caller import SCOPES, Caller, Limits
from app.keys.table import api_keys
from models.errors import InvalidRequest, NotFound

LONGEST_S = 10 * 365 * 24 * 3600.0
_REFUSAL = "this API key is not valid here; the operator can make another one"
_NOBODYS = "0" * 64  # compared with where there is no row, so that time does not tell which ids exist


@dataclass(frozen=True, kw_only=True)
class Key:
    """What may be known of a key: everything but its secret. Times are seconds since 1970."""

    id: str
    caller: str
    name: str
    scopes: tuple[str, ...]
    limits: Limits
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    def state(self, now: float) -> str:
        """`valid`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "valid"


class Keys:
    """The keys in one database, hashed with one pepper. Every method raises Unavailable where the database is away."""

    def __init__(self, database: Database, pepper: bytes):
        self._database, self._pepper = database, pepper

    async def create(
        self, name: str, scopes: tuple[str, ...], limits: Limits, lasts_s: float | None = None
    ) -> tuple[Key, str]:
        """A new key and its text, which is shown this once. Raises InvalidRequest naming what is out of range."""
        _check(name, scopes, lasts_s)
        limits.check()

        async def work(connection: AsyncConnection) -> tuple[Key, str]:
            now = await clock(connection)
            id, text = secrets.new()
            expires_at = None if lasts_s is None else now + lasts_s
            key = Key(
                id=id,
                caller=id,
                name=name,
                scopes=tuple(dict.fromkeys(scopes)),
                limits=limits,
                created_at=now,
                expires_at=expires_at,
                revoked_at=None,
            )
            await self._insert(connection, key, text)
            return key, text

        return await self._database.write(work)

    async def rotate(self, id: str, overlap_s: float) -> tuple[Key, str]:
        """A new key for the same caller, of the same lifetime, and its text; the old one is good for the overlap still.

        Raises NotFound, and InvalidRequest for a key that is no longer valid.
        """
        _check_seconds("overlap", overlap_s, 0)

        async def work(connection: AsyncConnection) -> tuple[Key, str]:
            now, old = await clock(connection), await _find(connection, id)
            if old.state(now) != "valid":
                raise InvalidRequest("id", f"key {id} is {old.state(now)}; create a new one")
            ends = now + overlap_s if old.expires_at is None else min(old.expires_at, now + overlap_s)
            await connection.execute(update(api_keys).where(api_keys.c.id == id).values(expires_at=ends))
            new_id, text = secrets.new()
            expires_at = None if old.expires_at is None else now + old.expires_at - old.created_at
            key = Key(**vars(old) | {"id": new_id, "created_at": now, "expires_at": expires_at})
            await self._insert(connection, key, text)
            return key, text

        return await self._database.write(work)

    async def revoke(self, id: str) -> Key:
        """Ends a key now; one that is revoked already stays as it is. Raises NotFound."""

        async def work(connection: AsyncConnection) -> Key:
            row = api_keys.c.id == id
            now = await clock(connection)
            await connection.execute(
                update(api_keys).where(row, api_keys.c.revoked_at.is_(None)).values(revoked_at=now)
            )
            return await _find(connection, id)

        return await self._database.write(work)

    async def list(self) -> tuple[float, list[Key]]:
        """The database's time and every key, the oldest first."""

        async def work(connection: AsyncConnection) -> tuple[float, list[Key]]:
            rows = await connection.execute(select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id))
            return await clock(connection), [_key(row) for row in rows]

        return await self._database.read(work)

    async def caller(self, text: str) -> Caller:
        """Whom a key stands for. Raises Unauthenticated."""
        id = secrets.id_of(text)
        if id is None:
            raise Unauthenticated(_REFUSAL)

        async def work(connection: AsyncConnection) -> tuple[float, Row[Any] | None]:
            found = await connection.execute(select(api_keys).where(api_keys.c.id == id))
            return await clock(connection), found.one_or_none()

        now, row = await self._database.read(work)
        if not secrets.agrees(_NOBODYS if row is None else row.digest, self._pepper, text) or row is None:
            raise Unauthenticated(_REFUSAL)
        key = _key(row)
        if key.state(now) != "valid":
            raise Unauthenticated(f"this API key is {key.state(now)}; the operator can make another one")
        return Caller(id=key.caller, name=key.name, scopes=frozenset(key.scopes), limits=key.limits)

    async def _insert(self, connection: AsyncConnection, key: Key, text: str) -> None:
        kept = asdict(key) | {"scopes": list(key.scopes), "digest": secrets.digest(self._pepper, text)}
        await connection.execute(insert(api_keys).values(kept))


def opened(database: Database, secret_file: str) -> Keys:
    """The keys of a database, peppered from the server's secret."""
    return Keys(database, secret.derive(secret.read_or_make(Path(secret_file)), "api keys"))


async def _find(connection: AsyncConnection, id: str) -> Key:
    row = (await connection.execute(select(api_keys).where(api_keys.c.id == id))).one_or_none()
    if row is None:
        raise NotFound(f"there is no key {id!r}; `heliograph keys list` shows them")
    return _key(row)


def _key(row: Row[Any]) -> Key:
    values = {name: value for name, value in row._mapping.items() if name != "digest"}
    return Key(**values | {"scopes": tuple(row.scopes), "limits": Limits(**row.limits)})


def _check(name: str, scopes: tuple[str, ...], lasts_s: float | None) -> None:
    if not (1 <= len(name) <= 100 and name.isprintable()):
        raise InvalidRequest("name", "must have 1 to 100 printable characters")
    if not scopes or not set(scopes) <= set(SCOPES):
        raise InvalidRequest("scopes", f"must be one or more of {', '.join(SCOPES)}")
    if "admin" in scopes and "jobs" not in scopes:
        raise InvalidRequest("scopes", "`admin` needs `jobs` beside it, which it widens to the jobs of all callers")
    if lasts_s is not None:
        _check_seconds("expires", lasts_s, 1)


def _check_seconds(field: str, seconds: float, least: float) -> None:
    if not least <= seconds <= LONGEST_S:
        raise InvalidRequest(field, f"must be between {least:.0f} and {LONGEST_S:.0f} seconds, not {seconds}")
