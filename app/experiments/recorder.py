"""Recorder: exposures on their way into the database, which may be slow or away while pictures are drawn."""

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from app.experiments.store import Exposure
from models.errors import Unavailable

PATIENCE_S = 1.0  # that an answer waits, so that feedback on it finds its exposure
PENDING_AT_MOST = 10_000  # beyond them the oldest are lost
AT_ONCE = 200
PAUSE_S = 2.0  # before a database that was away is tried again

_log = logging.getLogger(__name__)

Write = Callable[[Sequence[Exposure]], Awaitable[None]]


class Recorder:
    """Writes exposures down, many in one transaction where many come. Belongs to one event loop."""

    def __init__(self, write: Write, patience_s: float = PATIENCE_S, pause_s: float = PAUSE_S):
        self._write, self._patience_s, self._pause_s = write, patience_s, pause_s
        self._pending: deque[tuple[Exposure, asyncio.Future[None]]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._away = False

    async def record(self, seen: Sequence[Exposure]) -> bool:
        """Whether they are written down by now. Those that are not will be, once the database is back, unless too many
        come meanwhile; while it is away nobody waits."""
        written = [asyncio.get_running_loop().create_future() for _ in seen]
        self._pending.extend(zip(seen, written, strict=True))
        while len(self._pending) > PENDING_AT_MOST:
            self._pending.popleft()
            _log.warning("an exposure is lost: the database is away, and %d wait for it", PENDING_AT_MOST)
        if self._writing is None or self._writing.done():
            # A clean context: it is everybody's, and must not be cancelled with one request.
            self._writing = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())
        if not self._away:
            await asyncio.wait(written, timeout=self._patience_s)
        return all(one.done() and not one.cancelled() for one in written)

    async def _run(self) -> None:
        while self._pending:
            some = [self._pending[i] for i in range(min(AT_ONCE, len(self._pending)))]
            try:
                await self._write([exposure for exposure, _ in some])
            except (Unavailable, TimeoutError) as fault:
                if not self._away:
                    _log.warning("exposures are not written down yet: %s", fault)
                self._away = True
                await asyncio.sleep(self._pause_s)
                continue
            except Exception:  # trying again would help nobody, and keep those that come after
                _log.exception("%d exposures are lost", len(some))
                self._take_off(some)
                for _, future in some:
                    future.cancel()
                continue
            self._away = False
            self._take_off(some)
            for _, future in some:
                if not future.done():
                    future.set_result(None)

    def _take_off(self, some: Sequence[tuple[Exposure, asyncio.Future[None]]]) -> None:
        """The oldest may have been given up meanwhile."""
        gone = {id(one) for one in some}
        while self._pending and id(self._pending[0]) in gone:
            self._pending.popleft()
