"""The machine and the versions: without them a figure means nothing."""

import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "ray")
BUSY_LOAD = 0.5  # cores in use before the run starts, above which other work disturbs it
LOOK_S = 3.0


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
            packages={name: version(name) for name in PACKAGES},
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


def _processor() -> str:
    """Linux says it in a file; elsewhere the platform module has to do."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores_in_use() -> float:
    """Cores that are busy now. The system's load average would still tell of what ended minutes ago."""
    if not Path("/proc/stat").exists():
        return os.getloadavg()[0]
    before = _core_times()
    time.sleep(LOOK_S)
    after = _core_times()
    idle, total = (after[i] - before[i] for i in (0, 1))
    return (1 - idle / total) * (os.cpu_count() or 1)


def _core_times() -> tuple[int, int]:
    """(idle, all) ticks of all cores since the start (proc_stat(5))."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
