"""Exposures on their way into a database that is slow, or away for a while."""

import asyncio
import time
from collections.abc import Sequence

import pytest

from app.experiments import recorder
from app.experiments.recorder import Recorder
from app.experiments.store import Exposure
from models.errors import Unavailable
from tests.app.experiments.conftest import exposure
from tests.app.loopback import until


class Journal:
    """Takes exposures, unless it is away."""

    def __init__(self):
        self.written: list[Exposure] = []
        self.transactions = 0
        self.away = False
        self.pause_s = 0.0

    async def write(self, some: Sequence[Exposure]) -> None:
        await asyncio.sleep(self.pause_s)
        if self.away:
            raise Unavailable(1.0)
        self.transactions += 1
        self.written += some


async def test_an_answer_waits_until_its_exposure_is_written():
    journal = Journal()
    keeping = Recorder(journal.write)
    assert await keeping.record([exposure(1), exposure(1, experiment="other")])
    assert len(journal.written) == 2


async def test_many_at_once_share_transactions():
    journal = Journal()
    journal.pause_s = 0.02
    keeping = Recorder(journal.write)
    assert all(await asyncio.gather(*(keeping.record([exposure(n)]) for n in range(100))))
    assert sorted(one.id for one in journal.written) == [exposure(n).id for n in range(100)]
    assert journal.transactions <= 3


async def test_nobody_waits_long_and_nothing_is_lost_while_the_database_is_away():
    journal = Journal()
    journal.away, journal.pause_s = True, 0.05
    keeping = Recorder(journal.write, patience_s=0.2, pause_s=0.05)
    assert not await keeping.record([exposure(0)])
    began = time.monotonic()
    assert not any([await keeping.record([exposure(n)]) for n in range(1, 20)])
    assert time.monotonic() - began < 0.1  # it is known to be away: nobody waits
    journal.away = False
    await until(lambda: len(journal.written) == 20)
    assert [one.id for one in journal.written] == [exposure(n).id for n in range(20)]
    assert await keeping.record([exposure(20)])


async def test_a_slow_database_is_not_waited_for_beyond_patience():
    journal = Journal()
    journal.pause_s = 0.5
    keeping = Recorder(journal.write, patience_s=0.1)
    began = time.monotonic()
    assert not await keeping.record([exposure(1)])
    assert time.monotonic() - began < 0.4
    await until(lambda: len(journal.written) == 1)


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(recorder, "PENDING_AT_MOST", 10)
    journal = Journal()
    journal.away = True
    keeping = Recorder(journal.write, patience_s=0.05, pause_s=0.05)
    for n in range(15):
        await keeping.record([exposure(n)])
    assert "an exposure is lost" in caplog.text
    journal.away = False
    await until(lambda: [one.id for one in journal.written][-10:] == [exposure(n).id for n in range(5, 15)])


async def test_a_client_that_leaves_takes_no_exposure_with_it():
    journal = Journal()
    journal.pause_s = 0.1
    keeping = Recorder(journal.write)
    leaving = asyncio.create_task(keeping.record([exposure(1)]))
    await asyncio.sleep(0.02)
    leaving.cancel()
    await until(lambda: len(journal.written) == 1)


async def test_what_cannot_be_written_is_lost_and_said_so_and_the_next_is_written(caplog: pytest.LogCaptureFixture):
    journal = Journal()

    async def write(some: Sequence[Exposure]) -> None:
        if some[0].id == exposure(0).id:
            raise ValueError("no such column")
        await journal.write(some)

    keeping = Recorder(write)
    assert not await keeping.record([exposure(0)])
    assert "1 exposures are lost" in caplog.text
    assert await keeping.record([exposure(1)])
    assert [one.id for one in journal.written] == [exposure(1).id]
