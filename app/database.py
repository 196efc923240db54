"""The one database: SQLite in a file for one machine, PostgreSQL for many.

Whoever keeps something durable is handed a Database and gives it a piece of work: an async function of one connection,
run in one transaction, begun anew where the database asks for that. Work therefore changes nothing but the database.
Tables stand in `metadata`, whose schema the scripts of app/migrations build.

`sqlite:///jobs.db` goes through aiosqlite, `postgresql://user@host/name` through asyncpg: of the two async drivers with
deadlines for each statement it is the one under a permissive licence.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, AsyncAdaptedQueuePool, Connection, MetaData, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from models.errors import InvalidRequest, Unavailable

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]

metadata = MetaData(
    naming_convention={"ix": "ix_%(table_name)s_%(column_0_name)s", "uq": "uq_%(table_name)s_%(column_0_name)s"}
)

BUSY_S = 2.0  # how long one statement waits for another's lock
POOL_S = 5.0  # how long a transaction waits for a connection
CONNECT_S = 5.0
DEADLINE_S = 10.0  # of one try of one transaction
MIGRATION_S = 600.0
CLOSE_S = 5.0  # how long transactions under way may take to end
LOOK_S = 0.005  # how often a closing database looks whether they have
PAUSES_S = (0.02, 0.1, 0.4, 1.0)  # before each further try, more or less
RETRY_AFTER_S = 5.0

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
_SCRIPTS = Path(__file__).resolve().parent / "migrations"

# julianday counts days and has a precision of 50 microseconds; `unixepoch('subsec')` needs SQLite 3.42.
_CLOCKS = {
    "sqlite": text("SELECT (julianday('now') - 2440587.5) * 86400.0"),
    "postgresql": text("SELECT CAST(extract(epoch FROM clock_timestamp()) AS double precision)"),
}

# Failures after which the transaction surely did not happen and another try may succeed: serialization, deadlock, lock
# timeout, too many connections, server starting or stopping, a plan from before a migration (PostgreSQL, appendix A),
# and SQLite's busy.
_TRY_AGAIN = frozenset({"40001", "40P01", "55P03", "53300", "57P01", "57P02", "57P03", "0A000"})
_BUSY = ("SQLITE_BUSY", "SQLITE_LOCKED")
# Classes of failures that lie with the server: connection, resources (disk full), operator, system.
_SERVER = frozenset({"08", "53", "57", "58"})


class Database:
    """A pool of connections to one database. Belongs to the event loop that uses it first."""

    def __init__(self, url: str, *, pool_size: int = 8):
        self._url = _parsed(url)
        engine = _engine(self._url, pool_size, DEADLINE_S)
        self._reader = engine
        self._writer = engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        # SQLite has one writer at a time: who waits here, in order, leaves the connections to readers.
        self._turns = asyncio.Semaphore(1 if self.dialect == "sqlite" else pool_size)
        self._closed = False

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._reader.dialect.name

    @property
    def file(self) -> Path | None:
        """Where SQLite keeps it."""
        return Path(str(self._url.database)) if self.dialect == "sqlite" else None

    async def read(self, work: Work[T]) -> T:
        """What `work` returns, from one transaction that only reads. Raises Unavailable."""
        return await self._persist(self._reader, work)

    async def write(self, work: Work[T]) -> T:
        """What `work` returns, once its changes are committed; where it raises, nothing has changed.

        On SQLite the transaction is immediate: writers wait for each other before they read. Raises Unavailable, also
        where the connection broke during the commit, so that nobody knows whether it happened.
        """
        try:
            async with asyncio.timeout(POOL_S):
                await self._turns.acquire()
        except TimeoutError:
            raise Unavailable(RETRY_AFTER_S, "too many wait for the database") from None
        try:
            return await self._persist(self._writer, work)
        finally:
            self._turns.release()

    async def _persist(self, engine: AsyncEngine, work: Work[T]) -> T:
        if self._closed:
            raise Unavailable(RETRY_AFTER_S, "the database is closed: the process ends")
        return await _persist(engine, work)

    async def migrate(self, revision: str = "head") -> None:
        """Brings the schema up to a revision of app/migrations, in one transaction; several processes may try at once.

        Raises Unavailable, and RuntimeError where the database is newer than this program.
        """
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        engine = _engine(self._url, 1, MIGRATION_S).execution_options(sqlite_begin="BEGIN IMMEDIATE")
        try:
            await _persist(engine, lambda connection: _migrate(connection, revision), MIGRATION_S)
        finally:
            await engine.dispose()

    async def close(self) -> None:
        """Gives the connections back, once nobody uses them or after CLOSE_S. From now on all work is refused."""
        self._closed = True
        pool = cast(AsyncAdaptedQueuePool, self._reader.pool)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while pool.checkedout():  # noqa: ASYNC110  the pool tells nobody
                    await asyncio.sleep(LOOK_S)
        await self._reader.dispose()


def perform(url: str, work: Callable[[Database], Awaitable[T]], *, new: bool = True) -> T:
    """For commands: what `work` returns of a database, which is brought up to date before and closed after.

    Unless it may be `new`, raises InvalidRequest for a file that is not there.
    """

    async def performing() -> T:
        database = Database(url)
        if not new and database.file is not None and not database.file.exists():
            raise InvalidRequest("database", f"there is no file {database.file}; relative paths begin in this folder")
        try:
            await database.migrate()
            return await work(database)
        finally:
            await database.close()

    return asyncio.run(performing())


async def clock(connection: AsyncConnection) -> float:
    """The database's time in seconds since 1970: what leases and deadlines of all processes are compared with."""
    return float(await connection.scalar(_CLOCKS[connection.dialect.name]))


async def one_at_a_time(connection: AsyncConnection, what: str) -> None:
    """From here on the transaction is alone among those that say the same word; on SQLite, writers always are."""
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:what))"), {"what": f"heliograph {what}"})


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
        drivername = _DRIVERS[parsed.drivername.split("+")[0]]
    except (ArgumentError, KeyError):
        raise InvalidRequest("database", "must be sqlite:///<file> or postgresql://<user>@<host>/<name>") from None
    if drivername.startswith("sqlite") and parsed.database in (None, "", ":memory:"):
        raise InvalidRequest("database", "must name a file: jobs in memory would not outlive the process")
    return parsed.set(drivername=drivername)


def _engine(url: URL, pool_size: int, statement_s: float) -> AsyncEngine:
    sqlite = url.drivername.startswith("sqlite")
    settings = {"application_name": "heliograph", "lock_timeout": str(int(BUSY_S * 1000))}
    arguments: dict[str, Any] = {"timeout": CONNECT_S, "command_timeout": statement_s, "server_settings": settings}
    if sqlite:
        arguments = {"timeout": BUSY_S, "isolation_level": None}  # the driver leaves BEGIN to us
    engine = create_async_engine(
        url,
        connect_args=arguments,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_S,
        json_serializer=lambda value: orjson.dumps(value).decode(),
        json_deserializer=orjson.loads,
    )
    if sqlite:
        event.listen(engine.sync_engine, "connect", _set_up_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    """WAL lets readers read while one writes; FULL brings each commit to the disk before it is told."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "journal_size_limit=67108864"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


async def _persist(engine: AsyncEngine, work: Work[T], deadline_s: float = DEADLINE_S) -> T:
    """The work's result from the first try that is not thrown back. Raises Unavailable, and what the work raises."""
    for pause_s in (*PAUSES_S, None):
        try:
            return await _attempt(engine, work, deadline_s)
        except (DBAPIError, OSError, PoolTimeout) as error:
            if pause_s is None or not _may_try_again(error):
                raise _translated(error) from error
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
    raise AssertionError("the last try returns or raises")


async def _attempt(engine: AsyncEngine, work: Work[T], deadline_s: float) -> T:
    async with asyncio.timeout(deadline_s), engine.connect() as connection:
        await connection.begin()
        result = await work(connection)
        try:
            await connection.commit()
        except (DBAPIError, OSError) as error:
            if _undone(error):
                raise
            raise Unavailable(
                RETRY_AFTER_S, "the database broke off during a commit; ask whether it happened"
            ) from error
        return result


def _may_try_again(error: Exception) -> bool:
    """Not after a timeout, which has taken long enough."""
    broken = isinstance(error, DBAPIError) and error.connection_invalidated
    refused = isinstance(error, OSError) and not isinstance(error, TimeoutError)
    return broken or refused or _undone(error)


def _undone(error: Exception) -> bool:
    """Whether the database itself says that the transaction did not happen, and that it may succeed another time."""
    return _sqlstate(error) in _TRY_AGAIN or _sqlite_name(error).startswith(_BUSY)


def _translated(error: Exception) -> Exception:
    """Unavailable for what lies with the database; other errors are our own mistakes and stay what they are."""
    ours = _sqlite_name(error) == "SQLITE_ERROR"  # wrong SQL, which sqlite3 calls operational too
    theirs = isinstance(error, OperationalError | InterfaceError | OSError | PoolTimeout) and not ours
    if theirs or _may_try_again(error) or _sqlstate(error)[:2] in _SERVER:
        return Unavailable(RETRY_AFTER_S, "the database does not answer")
    return error


def _sqlstate(error: Exception) -> str:
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _sqlite_name(error: Exception) -> str:
    return getattr(getattr(error, "orig", None), "sqlite_errorname", None) or ""


async def _migrate(connection: AsyncConnection, revision: str) -> None:
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SET LOCAL lock_timeout = 0"))  # another process may migrate for minutes
    await one_at_a_time(connection, "migrate")
    await connection.run_sync(_upgrade, revision)


def _upgrade(connection: Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, revision)
    except CommandError as error:
        raise RuntimeError(f"the database has a schema that this program does not know: {error}") from error
