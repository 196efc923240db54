"""The machine and the versions: without them a figure means nothing. And what its host kept from it meanwhile."""

import asyncio
import os
import platform
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "ray")
BUSY_LOAD = 0.5  # cores in use before the run starts, above which other work disturbs it
LOOK_S = 3.0
# Shares of the cores' time that the host gave to others, above which a run is disturbed: of all of it, of one second.
STOLEN, STOLEN_AT_ONCE = 0.05, 0.5


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and with what a run was made."""

    processor: str
    cores: int
    memory_gib: int
    threads: int
    load_before: float
    system: str
    python: str
    packages: dict[str, str]
    date: str

    @classmethod
    def here(cls, threads: int) -> "Machine":
        return cls(
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            threads=threads,
            load_before=round(_cores_in_use(), 2),
            system=platform.platform(terse=True),
            python=platform.python_version(),
            packages=dict(_versions()),
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )

    @property
    def busy(self) -> bool:
        """Whether something else was running: then the figures are not worth keeping."""
        return self.load_before > BUSY_LOAD

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.packages.items())
        return (
            f"{self.processor}, {self.cores} cores, {self.memory_gib} GiB, {self.threads} torch threads, "
            f"{self.system}, Python {self.python}, {versions}; {self.date}; "
            f"cores in use before the run {self.load_before}"
        )


def _versions() -> Iterator[tuple[str, str]]:
    """Of those packages that are there: a benchmark of the networks needs no ray."""
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def _processor() -> str:
    """Linux says it in a file; elsewhere the platform module has to do."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(kw_only=True)
class Stolen:
    """The shares of the cores' time that a virtual machine's host gave to others, second by second; none elsewhere."""

    shares: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.shares) / len(self.shares) if self.shares else 0.0

    @property
    def worst(self) -> float:
        return max(self.shares, default=0.0)

    @property
    def disturbed(self) -> bool:
        """Whether it was so much that what was measured meanwhile tells of the host."""
        return self.mean > STOLEN or self.worst > STOLEN_AT_ONCE

    def __str__(self) -> str:
        return f"{self.mean:.0%}, at most {self.worst:.0%}"


@asynccontextmanager
async def watched(stolen: Stolen) -> AsyncIterator[None]:
    """Notes what the host takes while it is entered."""
    watching = asyncio.create_task(_watch(stolen))
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def _watch(stolen: Stolen) -> None:
    before = _core_times()
    while before.all:
        await asyncio.sleep(1.0)
        now = _core_times()
        stolen.shares.append((now.stolen - before.stolen) / max(1, now.all - before.all))
        before = now


def _cores_in_use() -> float:
    """Cores that are busy now. The system's load average would still tell of what ended minutes ago."""
    before = _core_times()
    if not before.all:
        return os.getloadavg()[0]
    time.sleep(LOOK_S)
    after = _core_times()
    return (1 - (after.idle - before.idle) / (after.all - before.all)) * (os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class _CoreTimes:
    """Ticks of all cores since the start; 0 where the system does not tell."""

    idle: int
    stolen: int
    all: int


def _core_times() -> _CoreTimes:
    """proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal, and guests, who are among the users."""
    told = Path("/proc/stat")
    if not told.exists():
        return _CoreTimes(idle=0, stolen=0, all=0)
    ticks = [int(word) for word in told.read_text().split("\n", 1)[0].split()[1:9]]
    return _CoreTimes(idle=ticks[3] + ticks[4], stolen=ticks[7], all=sum(ticks))
