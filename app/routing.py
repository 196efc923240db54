"""Which replica gets a request: the one that would be done with it first, by its pace and by what it is warm for.

Serve pickles this module by value into every process that calls a model. Each such process has a router of its own,
which hears of each replica once a second and knows itself what it has sent since.
"""

import asyncio
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from app.hint import Hint, Party
from app.lobby import Lobby

REPORT_S = 1.0  # how often replicas are asked
LAG_S = 1.5 * REPORT_S  # how old a report may be when it arrives here: what was sent since then is not in it
RECHECK_S = 1.0  # how long a call waits for room before it looks itself
STALE_S = 10.0  # an unchanged report that is older is that of an idle replica, or of a controller that is away
# What a replica that is not warm counts for, in times of the request's own work: a LoRA has to be read and put in
# place, a new size at most prepared for.
COLD_LORA = 1.0
COLD_SIZE = 0.25


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A request under way at a replica."""

    id: str
    hint: Hint
    at: float


@dataclass(kw_only=True)
class Standing:
    """A replica as this process knows it: its last report, when that came, and what is under way there from here."""

    report: Mapping[str, Any] = field(default_factory=dict)
    heard: float = -math.inf
    sent: list[Sent] = field(default_factory=list)

    def hear(self, report: Mapping[str, Any], now: float) -> None:
        """Takes a report; one that says what the last one said may be that one."""
        if report and report != self.report:
            self.report, self.heard = report, now

    def done(self, id: str) -> None:
        """A request of this id has come back. Those that share it, made within one request of the gateway, are as good
        as each other: in the end each has been taken off."""
        for position, one in enumerate(self.sent):
            if one.id == id:
                del self.sent[position]
                return

    def left(self, now: float) -> float:
        """The work it still has: what it reported and what was sent since, or else all that is under way from here."""
        if now - self.heard > STALE_S:
            return sum(one.hint.work for one in self.sent)
        return float(self.report.get("work_left", 0.0)) + sum(one.hint.work for one in self._since_report())

    def coldness(self, hint: Hint) -> float:
        """By how many times of its own work a request had better wait for a replica that is warm for it."""
        since = [one.hint for one in self._since_report()]
        loras = {*self.report.get("loras", ()), *(name for other in since for name in other.loras)}
        if not loras.issuperset(hint.loras):
            return COLD_LORA
        sizes = {*self.report.get("sizes", ()), *(other.size for other in since)}
        return 0.0 if hint.size in sizes else COLD_SIZE

    @property
    def pace(self) -> float:
        """Seconds per unit of work; 0 where it has not told."""
        return float(self.report.get("seconds_per_work", 0.0))

    def _since_report(self) -> Iterable[Sent]:
        return (one for one in self.sent if one.at >= self.heard - LAG_S)


def usual_pace(standings: Iterable[Standing]) -> float:
    """The mean pace of those that have told theirs; 0 where none has."""
    paces = [standing.pace for standing in standings if standing.pace > 0]
    return sum(paces) / len(paces) if paces else 0.0


def ends(standings: Iterable[Standing], hint: Hint, now: float) -> list[float]:
    """When each replica would be done with the request, in seconds from now; in work where no pace is known."""
    known = list(standings)
    usual = usual_pace(known) or 1.0
    return [
        (standing.left(now) + hint.work * (1 + standing.coldness(hint))) * (standing.pace or usual)
        for standing in known
    ]


class WorkRouter(RequestRouter):
    """Serve's router for handles of a model. Where calls come without a hint they go where least is left.

    With `hold_s` no replica is sent more than so many seconds of work while it can wait here: an engine keeps what it
    has taken on, so that a replica that comes later could not help. Whoever has nothing at any replica is let through,
    and so is an interactive request with a deadline, for engines to judge.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._standings: dict[ReplicaID, Standing] = {}
        self._lobby = Lobby()
        self._hold_s = math.inf
        self._usual_pace = math.inf  # as told last; while nobody has told, whatever is under way may take for ever

    def initialize_state(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hold_s: float | None = None
    ) -> None:
        """Serve calls it with `request_router_kwargs`."""
        self._hold_s = math.inf if hold_s is None else hold_s

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve calls it whenever a replica comes, goes or reports something new."""
        super().update_replicas(replicas)
        now = time.monotonic()
        self._standings = {r.replica_id: self._standings.get(r.replica_id, Standing()) for r in replicas}
        for replica in replicas:
            self._standings[replica.replica_id].hear(replica.routing_stats or {}, now)
        self._usual_pace = usual_pace(self._standings.values()) or self._usual_pace
        self._let_in()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve calls it where a call has found a replica dead, which the controller will tell some seconds later."""
        super().on_replica_actor_died(replica_id)
        self._standings.pop(replica_id, None)  # else it would seem to have room
        self._let_in()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Every replica in a rank of its own, the best first: within a rank Serve would go by numbers of requests."""
        if len(candidate_replicas) < 2:
            return [[replica] for replica in candidate_replicas]  # the last one may have gone during a wait for room
        replicas = random.sample(candidate_replicas, len(candidate_replicas))  # so that equals take turns
        standings = [self._standings.get(replica.replica_id, Standing()) for replica in replicas]
        now = time.monotonic()
        hint = _hint(pending_request)
        order = ends(standings, hint, now)
        full = [not hint.urgent and not self._has_room(standing, now) for standing in standings]
        return [[replicas[i]] for i in sorted(range(len(replicas)), key=lambda i: (full[i], order[i]))]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Chooses for this very call.

        Serve's own way keeps pending calls by an id that all calls made within one request share, and of several at a
        time it would find one: the others would wait for ever (Ray 2.60; tests/acceptance/test_scaling.py).
        """
        attempt = 0
        while True:
            while not self._replicas:
                self._replicas_updated_event.clear()
                await self._replicas_updated_event.wait()
            await self._room(_hint(pending_request))
            for rank in await self.choose_replicas(self._replicas_list, pending_request):
                if await self._takes(rank, pending_request, attempt):
                    self._record_queue_wait_time(pending_request)
                    return rank[0]
            await self._backoff(attempt)
            attempt += 1

    async def _takes(self, rank: list[RunningReplica], pending_request: PendingRequest, attempt: int) -> bool:
        """Whether the only replica of a rank has a place. The call counts as sent there from the start, so that those
        chosen for at the same time spread."""
        id, taken = pending_request.metadata.internal_request_id, False
        standing = self._standings.get(rank[0].replica_id, Standing())  # it may have gone by now
        standing.sent.append(Sent(id=id, hint=_hint(pending_request), at=time.monotonic()))
        self._let_in()
        try:
            taken = await self._select_from_candidate_replicas(rank, attempt) is not None
        finally:
            if not taken:
                standing.done(id)
        return taken

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve calls it once for each call that was chosen for, however it ended."""
        if replica_id in self._standings:
            self._standings[replica_id].done(internal_request_id)
            self._let_in()

    async def _room(self, hint: Hint) -> None:
        """Waits until a replica has room, where the call has to wait for that."""
        if hint.urgent or (self._is_room() and not self._lobby):
            return
        if not self._under_way()[hint.party]:
            return
        try:
            with self._lobby.place(hint) as waiter:
                while not await waiter.called(RECHECK_S):
                    self._let_in()  # nobody may have said that a report has become too old to count
        except asyncio.CancelledError:
            self._let_in()  # it may have been its turn
            raise

    def _let_in(self) -> None:
        """Lets one call in where there is room, or where it has come to have nothing at any replica. The next one
        follows once it is known where this one goes."""
        if not self._lobby or not self._standings:
            return
        under_way = self._under_way()
        waiter = self._lobby.next(under_way.__getitem__)
        if waiter is not None and (self._is_room() or not under_way[waiter.hint.party]):
            self._lobby.call(waiter)

    def _is_room(self) -> bool:
        """Whether any replica has some; without `hold_s` there always is."""
        now = time.monotonic()
        return math.isinf(self._hold_s) or any(self._has_room(standing, now) for standing in self._standings.values())

    def _has_room(self, standing: Standing, now: float) -> bool:
        """A replica that has not told its pace yet is taken for an ordinary one: else all that waits would be sent to
        the first that comes, in the second before its first report."""
        left = standing.left(now)
        return not left or math.isinf(self._hold_s) or left * (standing.pace or self._usual_pace) < self._hold_s

    def _under_way(self) -> Mapping[Party, float]:
        """The work that each has at replicas, as far as it was sent from here; added up once for all who wait."""
        work: defaultdict[Party, float] = defaultdict(float)
        for standing in self._standings.values():
            for one in standing.sent:
                work[one.hint.party] += one.hint.work
        return work


def _hint(pending_request: PendingRequest | None) -> Hint:
    return (pending_request and pending_request.kwargs.get("hint")) or Hint()
