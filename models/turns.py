"""Turns: who leads the next forward and who rides along, so that keys with work alive share a device fairly. No torch.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): what a flow of requests was given is added up in device
seconds, and whoever had least leads. Who takes less than a fair part saves up some of the rest, so that a light key
goes first whenever it comes. A forward is filled one candidate at a time, again from whoever had least, what this
forward gives them counted already. Within a flow those whose next step is shallow go first (models.deep_cache), for
the few short forwards until it is not, and then the most urgent.

A broad forward is slow for everyone in it, so turns alone would not keep a flood from its neighbour: of N keys, the one
that leads may expect a forward to take no longer than SHARE * N times what its own rows take alone. It then moves at
least as fast as with an N-th of the device to itself, and the others use what room there is. A light key spends what it
saved on forwards which only light ones share, or others at next to no cost: it is gone the sooner, and the flood has
broad forwards again. Where neighbours cost nothing, as on a GPU that is not full, no bound ever binds, nor with many
keys of few rows each. Batch work beside interactive work has the room that costs next to nothing.

Who comes also waits for the forward that is under way. While somebody who goes first has left only just, and may be
back any moment, forwards are short beside what it was given then. Where one key's work of one priority is alive, and
nobody has left, all of this changes nothing.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Generic, Protocol, TypeVar

from models.pace import Pace

Shape = tuple[int, int, int]
Flow = tuple[bool, str]  # a key's work of one priority: whether it is batch work, and whose

PATIENCE_S = 60.0  # who says no deadline is due after this long, so that nobody of one key is overtaken for ever
CREDIT = 100  # forwards of a plain picture: what a flow may have saved up
LIGHT = 10  # of these: who has saved more than that is light; a broad forward or two are not yet a difference
KNOWN = 1000  # flows that are remembered; of the others it is not known what they had
# The rest of its N-th is for what a key waits besides: the forward under way when it comes, others' decoding.
SHARE = 0.7
JOINING = 8  # newcomers to a forward: their prompts are encoded before it, for which the others wait
# Times what its own rows take, at which a light key has company all the same, and interactive work that of batch work.
FREE = 1.1
RECENTLY_S = 5.0  # on the device's clock: who left no longer ago is expected back, where it has come back before
WAITING = 0.5  # of what it was given last time: as long may a forward be that keeps it waiting when it is back
SHORT = 2.5  # plain forwards: shorter than that none has to be, since narrow ones get less done


class Candidate(Protocol):
    """The latents' shape, whether its next step is shallow (models.deep_cache), the rows it would take and the row
    positions these cost in a step that is not (models.work), its urgency (smaller is first), whose it is, and whether
    it has been in a forward before."""

    @property
    def shape(self) -> Shape: ...
    @property
    def shallow(self) -> bool: ...
    @property
    def rows(self) -> int: ...
    @property
    def breadth(self) -> float: ...
    @property
    def urgency(self) -> tuple[bool, float]: ...
    @property
    def key(self) -> str: ...
    @property
    def begun(self) -> bool: ...


C = TypeVar("C", bound=Candidate)
Queues = Mapping[Flow, Several[C]]


@dataclass
class _Stay:
    """A flow's last time here: whether it had been here before, until when it stayed, on the device's clock, and the
    device seconds that it was given."""

    again: bool
    until: float = 0.0
    given_s: float = 0.0


class Turns:
    """Counts for the flows alive, and for those that were of late.

    A flow that comes starts level with the others: an early arrival is no claim. The level rises by what a flow's part
    of each turn would have been, so that those who have had more than that are not overtaken for ever by newcomers; it
    stays among those alive, whose parts may be smaller for a time. A flow that comes back has what it saved, one that
    is new nothing: else keys made for one request each would go first for ever.
    """

    def __init__(self, pace: Pace):
        self._pace = pace
        self._had: dict[Flow, float] = {}  # device seconds
        self._level = {False: 0.0, True: 0.0}  # of each priority
        self._passed: set[Flow] = set()  # were there in the last turn and got nothing
        self._clock = 0.0  # device seconds of all
        self._spare_s = 0.0  # by which interactive work may be held up for batch work that cannot ride along
        self._here: set[Flow] = set()
        self._stays: dict[Flow, _Stay] = {}  # of who is here, or left recently

    def next(self, candidates: Iterable[C], cap: Callable[[Shape], int]) -> list[C]:
        """The next batch, of which the first one leads, under a cap in rows; who is in it is charged for it."""
        queues: dict[Flow, list[C]] = {}
        # Who skips goes first: for a few short forwards, and then the others are in step with it again. The other way
        # round it would wait for each step of somebody who skips none.
        for candidate in sorted(candidates, key=lambda candidate: (not candidate.shallow, candidate.urgency)):
            queues.setdefault(flow_of(candidate), []).append(candidate)
        self._meet(queues)
        if not queues:
            return []
        order = self._ordered(queues)
        batch = self._aside(queues, order, cap) or self._led(queues, order, cap)
        self._charge(queues, batch.members)
        return batch.members

    def _led(self, queues: Queues[C], order: list[Flow], cap: Callable[[Shape], int]) -> "_Batch[C]":
        """By the first flow."""
        leader = queues[order[0]][0]
        batch = _Batch(leader, cap(leader.shape), self._slower(order), self._longest_s(order[0]), self._pace)
        self._fill(batch, queues, order)
        return batch

    def _aside(self, queues: Queues[C], order: list[Flow], cap: Callable[[Shape], int]) -> "_Batch[C] | None":
        """Of batch work whose next step is shallow, which whole forwards of interactive work cannot take along: alone,
        where that takes no longer than company would have been allowed to slow the interactive work of late."""
        for flow in order if not order[0][0] else ():
            leader = queues[flow][0]
            if flow[0] and leader.shallow and self._pace.forward_s(leader.breadth, shallow=True) <= self._spare_s:
                batch = _Batch(leader, cap(leader.shape), FREE, self._spare_s, self._pace)
                for candidate in filter(batch.is_alike, queues[flow]):
                    if batch.takes(candidate):
                        batch.add(candidate)
                return batch
        return None

    def _meet(self, queues: Queues[C]) -> None:
        """Notes who has come, and forgets who left long ago."""
        self._stays |= {flow: _Stay(again=flow in self._had) for flow in queues if flow not in self._here}
        self._here = set(queues)
        since = self._clock - RECENTLY_S
        self._stays = {flow: stay for flow, stay in self._stays.items() if flow in self._here or stay.until >= since}

    def _ordered(self, queues: Queues[C]) -> list[Flow]:
        """The flows alive in the order of their turns; of the others those seen last are remembered.

        Interactive before batch work, then whoever had least. Of those who had the same, who was passed over goes
        first, so that newcomers cannot keep anybody waiting; and then the one with fewer candidates.
        """
        alive = {flow: self._had.pop(flow) for flow in queues if flow in self._had}
        for batch, level in self._level.items():
            had = [had for flow, had in alive.items() if flow[0] == batch] or [level]
            self._level[batch] = min(max(level, min(had)), max(had))
        for flow in queues:
            level = self._level[flow[0]]
            self._had[flow] = min(max(alive.get(flow, level), level - self._credit_s), level + self._credit_s)
        for flow in list(self._had)[: -max(KNOWN, len(queues))]:
            del self._had[flow]
        self._passed &= queues.keys()
        return sorted(queues, key=lambda flow: (*self._turn(flow), flow not in self._passed, len(queues[flow])))

    @property
    def _credit_s(self) -> float:
        return CREDIT * self._pace.plain_s

    def _turn(self, flow: Flow) -> tuple[bool, float]:
        """Smaller goes first. Rounded, so that sums made in another order are the same."""
        return flow[0], round(self._had[flow], 6)

    def _slower(self, order: list[Flow]) -> float:
        """How many times slower the first one may become by those who ride along."""
        peers = [flow for flow in order if flow[0] == order[0][0]]
        heavy = max(self._had[flow] for flow in peers) - LIGHT * self._pace.plain_s
        light = [flow for flow in peers if self._had[flow] < heavy]
        return max(FREE, SHARE * len(light or peers))

    def _longest_s(self, leader: Flow) -> float:
        """How long the forward may take, so that who is expected back does not wait for long."""
        left = ((flow, stay) for flow, stay in self._stays.items() if flow not in self._here and stay.again)
        given = [stay.given_s for flow, stay in left if stay.given_s and self._precedes(flow, leader)]
        return max(SHORT * self._pace.plain_s, WAITING * min(given)) if given else math.inf

    def _precedes(self, flow: Flow, leader: Flow) -> bool:
        """Whether it would go first if it were here, and not by chance."""
        if flow[0] != leader[0]:
            return leader[0]  # batch work gives way to all that is not
        return self._had.get(flow, math.inf) < self._had[leader] - LIGHT * self._pace.plain_s

    def _fill(self, batch: "_Batch[C]", queues: Queues[C], order: list[Flow]) -> None:
        alike = [deque(filter(batch.is_alike, _offered(queues[flow]))) for flow in order]
        turns = [(*self._turn(flow), n) for n, flow in enumerate(order) if alike[n]]
        heapify(turns)
        price = batch.forward_s(batch.leader.breadth) / batch.leader.breadth
        while turns and batch.room:
            priority, had, n = turns[0]
            candidate = alike[n].popleft()
            if batch.takes(candidate):
                batch.add(candidate)
                had += price * candidate.breadth
            elif not batch.is_late(candidate) and (order[n] != batch.flow or candidate.rows <= batch.room):
                alike[n].clear()  # what it has besides is less urgent, and could hardly fit
            if alike[n]:
                heapreplace(turns, (priority, had, n))
            else:
                heappop(turns)

    def _charge(self, queues: Queues[C], members: Several[C]) -> None:
        """Who got a place for all it has, has no more than CREDIT left: else a key that was content with little for
        long would shut the others out when it wants much."""
        breadth = sum(candidate.breadth for candidate in members)
        took_s = self._pace.forward_s(breadth, members[0].shallow)
        price = took_s / breadth
        self._clock += took_s
        if not flow_of(members[0])[0]:
            self._spare_s = min(self._spare_s + (FREE - 1) * took_s, self._pace.plain_s)
        else:
            self._spare_s = max(0.0, self._spare_s - took_s)
        for flow in queues:
            self._stays[flow].until = self._clock
        places = dict.fromkeys(queues, 0)
        peers = Counter(batch for batch, _ in queues)
        for candidate in members:
            flow = flow_of(candidate)
            self._had[flow] += price * candidate.breadth
            self._stays[flow].given_s += price * candidate.breadth
            self._level[flow[0]] += price * candidate.breadth / peers[flow[0]]
            places[flow] += 1
        self._passed = {flow for flow, count in places.items() if not count}
        content = {flow for flow, count in places.items() if count == len(queues[flow])}
        for batch in self._level:
            wanting = (self._had[flow] for flow in queues if flow[0] == batch and flow not in content)
            least = min(wanting, default=0.0) - self._credit_s
            for flow in content:
                self._had[flow] = max(self._had[flow], least if flow[0] == batch else 0.0)


class _Batch(Generic[C]):
    """A batch while it is filled. The leader fits in any case."""

    def __init__(self, leader: C, cap: int, slower: float, longest_s: float, pace: Pace):
        self.leader, self.flow = leader, flow_of(leader)
        self.members: list[C] = []
        self.room, self._joining = max(cap, leader.rows), JOINING
        self._slower, self._longest_s, self._pace = slower, longest_s, pace
        self._breadth = self._peers = self._own = 0.0  # of all, of those as urgent as the leader, of the leader's flow

    def takes(self, candidate: C) -> bool:
        """Whether it fits under the cap, is no newcomer too many, does not make the forward too long, and does not slow
        the leader down too far. Of batch work nobody interactive may notice much.
        """
        if candidate.rows > self.room or self.is_late(candidate):
            return False
        if not self.members:
            return True
        flow = flow_of(candidate)
        longest_s = self._longest_s
        if flow != self.flow:
            slower, own = (self._slower, self._own) if flow[0] == self.flow[0] else (FREE, self._peers)
            longest_s = min(longest_s, slower * self.forward_s(own))
        return longest_s == math.inf or self.forward_s(self._breadth + candidate.breadth) <= longest_s

    def forward_s(self, breadth: float) -> float:
        """Seconds of a forward of the leader's kind."""
        return self._pace.forward_s(breadth, self.leader.shallow)

    def is_alike(self, candidate: C) -> bool:
        """Whether one forward can be of it and the leader."""
        return (candidate.shape, candidate.shallow) == (self.leader.shape, self.leader.shallow)

    def is_late(self, candidate: C) -> bool:
        """Whether it is one newcomer too many."""
        return not (candidate.begun or self._joining)

    def add(self, candidate: C) -> None:
        flow, breadth = flow_of(candidate), candidate.breadth
        self.members.append(candidate)
        self.room -= candidate.rows
        self._joining -= not candidate.begun
        self._breadth += breadth
        self._peers += breadth * (flow[0] == self.flow[0])
        self._own += breadth * (flow == self.flow)


def _offered(waiting: Several[C]) -> Iterable[C]:
    """Those of a flow that may ride along: its newcomers wait while others of it skip steps, else all of them would be
    begun, one after the other, in forwards that these cannot share."""
    return [each for each in waiting if each.begun] if waiting[0].shallow else waiting


def flow_of(candidate: Candidate) -> Flow:
    """Whose work it is, and of which priority."""
    return candidate.urgency[0], candidate.key
