"""Guard rails: arms that do worse than they may are switched off for a while, and their units get the control arm.

Each process counts what it sees: with several gateways, each switches its own units' arm off, and jobs, which runners
draw, switch nothing off at a gateway.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from app.experiments.settings import GuardSettings

State = Literal["on", "off", "probation"]
Key = tuple[str, str, str]  # experiment, version, arm: what was seen of another version says nothing of this one


@dataclass
class _Rail:
    """What was seen of an arm lately: whether each exposure went wrong, and the seconds of those that did not."""

    seen: deque[tuple[bool, float | None]]
    off_until: float | None = None
    reason: str = ""
    trips: int = 0
    seen_since: int = field(default=0)  # it is on


@dataclass(frozen=True)
class RailState:
    """How an arm stands, why it was switched off last, and how often it was."""

    state: State = "on"
    reason: str = ""
    trips: int = 0


class Rails:
    """Every arm's rail in this process. `now` is a clock in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._rails: dict[Key, _Rail] = {}

    def note(self, key: Key, guard: GuardSettings, failed: bool, seconds: float | None) -> None:
        """One exposure, and how long it took; None for what was not drawn. Of an arm that is off nothing counts: that
        was begun before."""
        rail = self._rails.setdefault(key, _Rail(deque(maxlen=guard.window)))
        self._recover(rail)
        if rail.off_until is not None:
            return
        if rail.seen.maxlen != guard.window:
            rail.seen = deque(rail.seen, maxlen=guard.window)
        rail.seen.append((failed, seconds))
        rail.seen_since += 1
        if reason := _breach(rail.seen, guard):
            rail.off_until, rail.reason = self._now() + guard.recover_after_s, reason
            rail.trips, rail.seen_since = rail.trips + 1, 0
            rail.seen.clear()

    def state(self, key: Key, guard: GuardSettings) -> RailState:
        """How an arm stands now."""
        rail = self._rails.get(key)
        if rail is None:
            return RailState()
        self._recover(rail)
        if rail.off_until is not None:
            return RailState("off", rail.reason, rail.trips)
        proving = rail.trips > 0 and rail.seen_since < guard.least
        return RailState("probation" if proving else "on", rail.reason, rail.trips)

    def keep(self, keys: set[Key]) -> None:
        """Forgets what is no longer configured."""
        self._rails = {key: rail for key, rail in self._rails.items() if key in keys}

    def _recover(self, rail: _Rail) -> None:
        if rail.off_until is not None and self._now() >= rail.off_until:
            rail.off_until = None


def _breach(seen: deque[tuple[bool, float | None]], guard: GuardSettings) -> str:
    """Which bound is broken, empty where none is.

    So many errors that the bound were broken even if the least number had been seen are enough: an arm on probation
    that still fails is off again at once.
    """
    errors, judged = sum(failed for failed, _ in seen), max(len(seen), guard.least)
    if guard.max_error_rate is not None and errors > guard.max_error_rate * judged:
        return f"{errors} of {len(seen)} failed, beyond a rate of {guard.max_error_rate}"
    took = sorted(seconds for failed, seconds in seen if not failed and seconds is not None)
    if guard.max_p95_s is not None and len(took) >= guard.least:
        p95 = took[math.ceil(0.95 * len(took)) - 1]
        if p95 > guard.max_p95_s:
            return f"p95 of {p95:.2f} s, beyond {guard.max_p95_s} s"
    return ""
