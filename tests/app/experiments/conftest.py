"""The databases of the jobs' tests, and exposures to write into them."""

from dataclasses import replace
from typing import Any

import pytest

from app.database import Database
from app.experiments.store import ExperimentStore, Exposure
from tests.app.jobs.conftest import blank_file, blank_server, database, server, url

__all__ = ["blank_file", "blank_server", "database", "server", "url"]


@pytest.fixture
def store(database: Database) -> ExperimentStore:
    return ExperimentStore(database)


def exposure(n: int, arm: str = "control", **changes: Any) -> Exposure:
    """Number n, of a unit of its own unless that is said."""
    one = Exposure(
        id=f"{n:032x}",
        experiment="steps",
        arm=arm,
        assigned=changes.pop("assigned", arm),
        version="v1",
        unit=f"unit-{n}",
        shadow=False,
        owner="ada",
        model="sd15",
        receipt_id=f"{n + 10**6:032x}",
        total_s=1.0,
        engine_s=0.5,
    )
    return replace(one, **changes)
