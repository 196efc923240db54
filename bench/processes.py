"""Who uses the processors: the seconds of a server's processes and of its client's, by what they are."""

import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

# What a process is, by what its command line has in it; the first that fits.
KINDS = (
    ("gateway", "ServeReplica:gateway"),
    ("model", "ServeReplica:model-"),
    ("proxy", "ray::ProxyActor"),
    ("HAProxy", "bin/haproxy"),
    ("HAProxy", "ray::HAProxyManager"),
    ("controller", "ray::ServeController"),
)
CLIENT = "client"
REST = "Ray's own"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Processor seconds by kind over `seconds`, and the one process that used the most."""

    seconds: float
    by_kind: dict[str, float]
    busiest: str
    busiest_s: float

    @property
    def cores(self) -> float:
        """In use on average."""
        return sum(self.by_kind.values()) / self.seconds

    @property
    def load(self) -> float:
        """The busiest process's share of one core."""
        return self.busiest_s / self.seconds


class Meter:
    """Looks at this process, which is the client, and at a server's from its first one down."""

    def __init__(self, server: int):
        self._server = server
        self.start()

    def start(self) -> None:
        self._began, self._before = time.monotonic(), self._times()

    def stop(self) -> Usage:
        """What was used since `start`, without processes that began or ended meanwhile."""
        seconds, after = time.monotonic() - self._began, self._times()
        used = {process: after[process] - self._before[process] for process in after.keys() & self._before.keys()}
        kinds = {process: kind_of(process) for process in used}
        by_kind = {kind: sum(s for process, s in used.items() if kinds[process] == kind) for kind in kinds.values()}
        busiest = max(used, key=lambda process: used[process])
        return Usage(seconds=seconds, by_kind=by_kind, busiest=kinds[busiest], busiest_s=used[busiest])

    def _times(self) -> dict[psutil.Process, float]:
        found = {}
        for process in [psutil.Process(), *below(self._server)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            found[process] = times.user + times.system
        return found


def below(server: int) -> list[psutil.Process]:
    """A process and its descendants."""
    process = psutil.Process(server)
    return [process, *process.children(recursive=True)]


def kind_of(process: psutil.Process) -> str:
    """What a process is."""
    if process == psutil.Process():
        return CLIENT
    try:
        line = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return REST
    return next((kind for kind, mark in KINDS if mark in line), REST)


def replica_mib(server: int) -> list[float]:
    """What each replica of a model holds in MiB, with its share of the pages that several map (PSS)."""
    found = []
    for process in below(server):
        with suppress(psutil.NoSuchProcess):
            if kind_of(process) == "model":
                found.append(process.memory_full_info().pss / 2**20)
    return found
