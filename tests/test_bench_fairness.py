"""The fairness benchmark's arithmetic: what it tells of made-up answers, and that it waits for no answer to send."""

import asyncio
import time
from pathlib import Path

import pytest

from app.deployment import MODEL_IMPORT, Deployment
from bench.fairness import FLOOD, LIGHT, Answer, Part, configured, sheet_of, trickle
from bench.machine import Stolen, watched
from bench.simulation import SIMULATED_IMPORT, real


def answers(latencies: list[float], status: int = 200) -> list[Answer]:
    return [Answer(sent_s=n, finished_s=n + latency, status=status) for n, latency in enumerate(latencies)]


def part(title: str, light: list[float], flood: list[float]) -> Part:
    made = Part(title=title)
    made.answers[LIGHT] = answers(light)
    made.answers[FLOOD] = [Answer(sent_s=0.0, finished_s=finished, status=200) for finished in flood]
    return made


def test_percentiles_are_the_light_keys_and_the_rate_the_floods():
    both = part("both", [1.0] * 19 + [4.0], [2.0, 5.0, 10.0])
    both.answers[FLOOD].append(Answer(sent_s=0.0, finished_s=0.1, status=429))
    assert (both.latency_s(50), both.latency_s(95), both.latency_s(100)) == (1.0, 1.0, 4.0)
    assert both.pictures_per_s() == pytest.approx(0.3)
    assert both.errors() == 1
    before, flooded, after = (
        part("before", [0.5] * 20, []),
        part("flood", [], [5.0] * 10),
        part("after", [0.8] * 20, []),
    )
    rows = sheet_of([before, flooded, both, after], 10).rows
    assert rows[-1] == ["both / alone", "–", "2.00", "1.25", "0.15", "–", "–"]


def test_a_host_that_takes_much_at_once_or_much_in_all_disturbs():
    assert not Stolen(shares=[0.04] * 10).disturbed
    assert Stolen(shares=[0.06] * 10).disturbed
    assert Stolen(shares=[*[0.0] * 99, 0.6]).disturbed
    assert not Stolen().disturbed


async def test_what_the_host_takes_is_noted_every_second():
    stolen = Stolen()
    async with watched(stolen):
        await asyncio.sleep(2.5)
    assert 1 <= len(stolen.shares) <= 2
    assert all(0 <= share <= 1 for share in stolen.shares)


async def test_a_request_is_sent_every_second_whether_or_not_the_last_is_answered():
    class Slow:
        def __init__(self) -> None:
            self.sent: list[float] = []

        async def ask(self, began: float, sent_s: float) -> Answer:
            self.sent.append(time.monotonic() - began)
            await asyncio.sleep(1.5)
            return Answer(sent_s=sent_s, finished_s=time.monotonic() - began, status=200)

    slow = Slow()
    told = await trickle(slow, lambda sent: sent < 2)  # pyright: ignore[reportArgumentType]
    assert [round(at) for at in slow.sent] == [0, 1]
    assert [answer.sent_s for answer in told] == [0.0, 1.0]
    assert all(1.4 < answer.latency_s < 2.5 for answer in told)


@pytest.mark.parametrize(("simulation", "runs"), [(False, MODEL_IMPORT), (True, SIMULATED_IMPORT)])
def test_there_are_keys_and_one_model_whose_networks_compute_or_only_take_time(
    tmp_path: Path, simulation: bool, runs: str
):
    config = configured(tmp_path, 2, simulation)
    assert [one["import_path"] for one in config["applications"] if one["name"].startswith("model-")] == [runs]
    deployment = Deployment.model_validate(real(config))
    assert [(model.name, model.threads) for model in deployment.models] == [("sd15", 1 if simulation else 2)]
    assert deployment.gateway.auth == "keys"
