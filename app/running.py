"""Running: a request on its way through a gateway, whichever replica has it at the moment, or none."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from app.events import Admitted, Ending, ReplicaEvent
from models.admission import TRUST
from models.errors import Cancelled, DeadlineTooShort, GenerationFailed
from models.events import Failed, Finished, Progress
from models.limits import DEADLINE_S
from models.request import EffectiveRequest


class Running:
    """What was asked for, how long that may take, how it is to end, and what has been told of it already."""

    def __init__(self, request: EffectiveRequest, patience_s: float):
        self._ending: Ending | None = None
        self._request = request
        self._deadline = time.monotonic() + patience_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Timeout | None = None  # of what is being waited for
        self._admitted = False
        self._delivered: set[int] = set()
        self._step = 1  # the furthest that a picture has come

    @property
    def request(self) -> EffectiveRequest:
        """What to send to a replica now: with the time that is left, and up to the step at which it was accepted."""
        request = self._request
        if request.deadline_s is not None:
            left_s = min(request.deadline_s, self._left_s())
            request = replace(request, deadline_s=max(DEADLINE_S.low, left_s))
        if self.accepted:
            request = replace(request, stop_at_step=min(self._step, request.stop_at_step or self._step))
        return request

    @property
    def accepted(self) -> bool:
        """Whether it is to end with the present estimate of each picture."""
        return self._ending == "accept"

    def end(self, ending: Ending) -> None:
        """How the request is to end; from any thread."""
        self._loop.call_soon_threadsafe(self._end, ending)

    def _end(self, ending: Ending) -> None:
        self._ending = ending
        if ending == "cancel" and self._timer is not None and not self._timer.expired():
            self._timer.reschedule(self._loop.time())

    @asynccontextmanager
    async def patience(self) -> AsyncIterator[None]:
        """Bounds an await. Raises GenerationFailed past the deadline, and Cancelled as soon as that is how it ends."""
        try:
            async with asyncio.timeout(0.0 if self._ending == "cancel" else self._left_s()) as self._timer:
                yield
        except TimeoutError as late:
            if self._ending == "cancel":
                raise Cancelled from late
            raise GenerationFailed("deadline", "the pictures were not finished in time") from late
        finally:
            self._timer = None

    def has_told(self, event: ReplicaEvent) -> bool:
        """Whether an earlier attempt has said it."""
        if isinstance(event, Admitted):
            return self._admitted
        return not isinstance(event, Failed) and event.index in self._delivered

    def told(self, event: ReplicaEvent, sent: EffectiveRequest) -> ReplicaEvent:
        """The event, where a replica was sent less than what was asked for as well.

        It knows of no early end; nor of the time that was lost before, which is not the caller's mistake.
        """
        asked_s = self._request.deadline_s
        refused = event.error if isinstance(event, Failed) else None
        if isinstance(refused, DeadlineTooShort) and asked_s is not None and asked_s >= TRUST * refused.least_s:
            return Failed(error=GenerationFailed("deadline", "the pictures could not be finished in time any more"))
        if (
            isinstance(event, Finished)
            and event.stop_at_step is None
            and sent.stop_at_step != self._request.stop_at_step
        ):
            return replace(event, stop_at_step=sent.stop_at_step)
        return event

    def note(self, event: ReplicaEvent) -> None:
        """Remembers what has been told."""
        match event:
            case Admitted():
                self._admitted = True
            case Progress(step=step):
                self._step = max(self._step, step)
            case Finished(index=index):
                self._delivered.add(index)

    def _left_s(self) -> float:
        return self._deadline - time.monotonic()
