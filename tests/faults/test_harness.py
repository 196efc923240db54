"""A short run of the fault harness: each kind of fault once against a real server, and every invariant holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from app.jobs.states import State
from bench.serving import PROJECT
from tests.faults.log import EndJob, Injected, read
from tests.faults.plan import KILLS
from tests.faults.system import processes_of

KINDS = {*KILLS, "database", "disk"}
JOBS = 14
TIMEOUT_S = 480.0  # a webhook whose deliverer was killed is sent again after its lease of a minute


@pytest.mark.timeout(TIMEOUT_S + 100.0)
def test_nothing_is_lost_while_each_part_fails_once(tmp_path: Path):
    folder = tmp_path / "run"
    options = {"faults": len(KINDS), "jobs": JOBS, "seed": 4, "every": 1.5, "outage": 2, "rest": 0, "out": folder}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tests.faults", *words]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as harness:
        try:
            told, _ = harness.communicate(timeout=TIMEOUT_S)
        finally:
            harness.terminate()  # where it is late; it stops its server then
    assert harness.returncode == 0, told
    events = read(folder / "events.jsonl")
    assert {event.kind for event in events if isinstance(event, Injected)} == KINDS
    ends = [event.state for event in events if isinstance(event, EndJob)]
    assert len(ends) == JOBS
    assert ends.count(State.SUCCEEDED) >= JOBS // 2
    assert not processes_of(folder), "the harness leaves processes behind"
