"""`heliograph store sweep` on the database and the folder of a configuration."""

import asyncio
import subprocess
import sys
from pathlib import Path

import yaml

from app.database import Database
from app.results.receipt import compose
from app.results.results import Results, new_id
from app.stores.folder import Folder
from app.stores.links import Links
from tests.app.results.conftest import SECRET, drawn

ROOT = Path(__file__).resolve().parents[3]


def test_the_sweep_removes_what_is_over_its_time_and_keeps_the_rest(tmp_path: Path):
    url, pictures = f"sqlite:///{tmp_path / 'data' / 'heliograph.db'}", tmp_path / "pictures"
    asyncio.run(_fill(url, Folder(pictures, Links(SECRET))))
    swept = _sweep(tmp_path, url)
    assert swept.returncode == 0, swept.stderr
    assert swept.stderr.strip() == "removed 1 results and 0 stored objects without an owner"
    assert len([*pictures.rglob("*.png")]) == 1


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path):
    swept = _sweep(tmp_path, f"sqlite:///{tmp_path / 'data' / 'heliograph.db'}")
    assert swept.returncode == 1
    assert "there is no file" in swept.stderr
    assert not (tmp_path / "data").exists()


def _sweep(tmp_path: Path, url: str) -> subprocess.CompletedProcess[str]:
    raw = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    store = {"kind": "folder", "path": str(tmp_path / "pictures")}
    for application in raw["applications"][-2:]:  # the runners and the gateway
        application["args"] |= {"database": url, "secret_file": str(tmp_path / "secret"), "store": store}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "app.cli", "store", "sweep", "--config", str(tmp_path / "config.yaml")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


async def _fill(url: str, folder: Folder) -> None:
    """A result whose time is over and one whose time is not."""
    database = Database(url)
    await database.migrate()
    for keep_s in (1e-6, 3600.0):
        results, id, what = Results(database, folder, keep_s), new_id(), drawn()
        await results.record("ada", compose(id, 0, what), await results.put(id, what.images))
    await database.close()
