"""Shadows: requests that are drawn beside what was answered, after it, and shown to nobody."""

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from models.errors import HeliographError
from models.request import GenerationRequest

AT_ONCE = 4  # that a process draws; more are left out
DEADLINE_S = 120.0

_log = logging.getLogger(__name__)


class Shadows:
    """Draws shadows with `draw`, a few at a time. Belongs to one event loop."""

    def __init__(self, draw: Callable[[GenerationRequest], Awaitable[object]], at_once: int = AT_ONCE):
        self._draw, self._at_once = draw, at_once
        self._running: set[asyncio.Task[None]] = set()
        self.left_out = 0  # because as many as may were being drawn

    def start(self, shadows: Sequence[GenerationRequest], seed: int) -> None:
        """Begins with the seed of what was answered, so that the pictures can be compared; waits for nothing.

        As batch work it waits for what somebody is waiting for. Its context is a clean one: it is nobody's, so no
        caller pays for it, and Serve does not cancel it with the request.
        """
        for shadow in shadows:
            if len(self._running) >= self._at_once:
                self.left_out += 1
                continue
            wanted = replace(shadow, seed=seed, priority="batch", deadline_s=DEADLINE_S, preview_every=0)
            task = asyncio.get_running_loop().create_task(self._drawn(wanted), context=contextvars.Context())
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _drawn(self, wanted: GenerationRequest) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._draw(wanted)
        except (HeliographError, TimeoutError) as fault:
            _log.info("a shadow was not drawn: %s", fault)
