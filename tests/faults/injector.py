"""Who breaks things: one planned fault after the other, each told to the log once it is over."""

import asyncio
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

from tests.faults.databases import DatabaseUnderTest
from tests.faults.log import FaultKind, Injected, Log
from tests.faults.places import Place
from tests.faults.plan import KILLS, PlannedFault
from tests.faults.system import System

PROCESS_TIMEOUT_S = 120.0  # in which a process that was killed has a successor
LOOK_S = 0.2
WRITERS: tuple[FaultKind, ...] = ("gateway", "runner")  # whoever writes to the database and to the folder
SMALLEST_FILE = 1024  # bytes that fit on a full disk


class Injector:
    """Breaks one system as planned."""

    def __init__(self, system: System, database: DatabaseUnderTest, place: Place, log: Log):
        self._system, self._database, self._place, self._log = system, database, place, log

    async def run(self, faults: Sequence[PlannedFault], began: float, told: Callable[[], object]) -> None:
        """Every fault at its time, also while another lasts. `began` is the loop's time; `told` hears of each."""
        async with asyncio.TaskGroup() as tasks:
            for fault in faults:
                await asyncio.sleep(began + fault.at_s - asyncio.get_running_loop().time())
                task = tasks.create_task(self._inject(fault))
                task.add_done_callback(lambda _: told())

    async def _inject(self, fault: PlannedFault) -> None:
        at = time.time()
        if fault.kind in KILLS:
            process = await self._one(fault.kind, fault.choice)
            at, target = time.time(), f"process {process.pid}"
            with suppress(psutil.NoSuchProcess):  # it has gone by itself
                process.kill()
        elif fault.kind == "database":
            target = await self._database.outage(fault.lasts_s, fault.choice)
        elif fault.kind == "store":
            target = await self._place.outage(fault.lasts_s, fault.choice)
        else:
            target = await self._full_disk(fault.lasts_s)
        self._log.write(Injected(at=at, kind=fault.kind, until=time.time(), target=target))

    async def _one(self, kind: FaultKind, choice: float) -> psutil.Process:
        """One of the processes that do this; while there is none, one that is to come."""
        async with asyncio.timeout(PROCESS_TIMEOUT_S):
            while True:
                if found := self._system.processes(kind):
                    return found[int(choice * len(found))]
                await asyncio.sleep(LOOK_S)

    async def _full_disk(self, lasts_s: float) -> str:
        """For whoever writes, no file may grow: the kernel refuses it (EFBIG), as it does where no room is left."""
        writers = [process for kind in WRITERS for process in self._system.processes(kind)]
        with without_room(writers):
            await asyncio.sleep(lasts_s)
        return f"{len(writers)} processes had no room on the disk"


@contextmanager
def without_room(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """None of these can make a file larger than SMALLEST_FILE, or write beyond that in one."""
    before: list[tuple[psutil.Process, tuple[int, int]]] = []
    try:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                soft, hard = process.rlimit(resource.RLIMIT_FSIZE)  # pyright: ignore[reportGeneralTypeIssues]
                before.append((process, (soft, hard)))
                process.rlimit(resource.RLIMIT_FSIZE, (SMALLEST_FILE, hard))
        yield
    finally:
        for process, limits in before:
            with suppress(psutil.NoSuchProcess):
                process.rlimit(resource.RLIMIT_FSIZE, limits)
