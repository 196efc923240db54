"""`heliograph experiments` where no server is needed."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.database import Database
from app.experiment_commands import plot
from app.experiments.store import ExperimentStore
from tests.app.experiments.conftest import exposure

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("low", "estimate", "high", "line"),
    [
        (-0.5, 0.0, 0.5, "··········├─────────●─────────┤··········"),
        (0.1, 0.25, 0.4, "····················│·├──●──┤············"),
        (-1.0, -1.0, 1.0, "●───────────────────┼───────────────────┤"),
    ],
)
def test_a_plot_has_the_interval_the_estimate_and_zero(low: float, estimate: float, high: float, line: str):
    assert plot({"low": low, "high": high}, estimate, 1.0) == line
    assert plot({"low": 4 * low, "high": 4 * high}, 4 * estimate, 4.0) == line


async def test_an_experiment_is_forgotten(tmp_path: Path, blank_file: Path):
    url = f"sqlite:///{shutil.copy(blank_file, tmp_path / 'heliograph.db')}"
    raw = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    for application in raw["applications"][-2:]:
        application["args"] |= {"database": url, "secret_file": str(tmp_path / "secret")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    database = Database(url)
    await ExperimentStore(database).record([exposure(1), exposure(2)])
    command = [sys.executable, "-m", "app.cli", "experiments", "forget", "steps", "-c", tmp_path / "config.yaml"]
    ran = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, "removed 2 exposures of steps" in ran.stderr) == (0, True), ran.stderr
    assert await ExperimentStore(database).totals("steps", "v1") == {}
    await database.close()
