"""The scale benchmark's own honesty: what is simulated and what is real, who is metered, and where a line bends."""

import asyncio
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from app.deployment import Deployment
from app.settings import ModelSettings
from bench.crowd import Crowd, Reading, quantile_ms
from bench.fleet import Fleet
from bench.machine import Machine
from bench.processes import Meter, Usage
from bench.scale import (
    DEFAULT,
    FREE,
    HAPROXY,
    QUERIES,
    SETTINGS,
    SHORT,
    TIMES,
    Profile,
    environment,
    has_room,
    left_out,
    write,
)
from bench.scaling import CLOSED, OPEN, Case, efficiency, facts, sheets
from bench.serving import PROJECT
from bench.simulation import SIMULATED_IMPORT, real, simulated


def case(load: str, replicas: int, per_s: float, busiest: str = "gateway", busiest_s: float = 0.5, cores: float = 1.0):
    usage = Usage(seconds=1.0, by_kind={"gateway": cores / 2, "proxy": cores / 2}, busiest=busiest, busiest_s=busiest_s)
    latency_s = (0.1,) * round(10 * per_s)
    reading = Reading(seconds=10.0, failed=0, latency_s=latency_s, way_s=latency_s, usage=usage)
    return Case(profile="default", gateways=1, replicas=replicas, load=load, reading=reading, mib=300.0)


def test_a_line_bends_where_replicas_give_less_than_nine_tenths_of_one_each():
    straight = [case(CLOSED, 1, 2.0), case(CLOSED, 4, 7.9)]
    bent = case(CLOSED, 8, 12.0, busiest_s=0.99)
    assert efficiency(bent, [*straight, bent]) == pytest.approx(0.75)
    assert "no bend up to 4 replicas" in next(facts(straight, cores=2))
    told = next(facts([*straight, bent], cores=2))
    assert "bends at 8 replicas (75% of 8 times one)" in told
    assert "one process is full (gateway, 99% of a core)" in told


def test_a_full_machine_is_told_from_a_full_process():
    crowded = [case(CLOSED, 1, 2.0), case(CLOSED, 8, 8.0, busiest="model", cores=1.95)]
    assert "the machine is full (1.9 of 2 cores)" in next(facts(crowded, cores=2))


def test_what_a_process_could_do_alone_comes_from_its_own_time():
    """16 answers a second at half a core of the gateway's: with a whole one it would be 32."""
    found = [case(CLOSED, 1, 2.0), case("a picture", 2, 1.6)]
    assert "default, a picture: with a core of its own a gateway 32, a proxy 32 a second." in facts(found, 2)


def test_tables_have_a_row_for_each_case_and_pair_of_cases():
    found = [
        case("a picture", 2, 1.6),
        case(CLOSED, 1, 2.0),
        case(OPEN, 1, 1.4),
        case(CLOSED, 2, 3.0),
        case(OPEN, 2, 2),
    ]
    gateways, replicas = sheets(found)
    assert [row[0] for row in gateways.rows] == ["default, 1 gateway: a picture"]
    assert [row[:3] for row in replicas.rows] == [["1", "2.00", "100%"], ["2", "3.00", "75%"]]


def test_a_quantile_is_one_of_the_measured():
    assert quantile_ms([0.3, 0.1, 0.2], 0.5) == 200
    assert quantile_ms([], 0.5) is None


def test_the_profile_that_is_measured_is_the_one_that_clusters_are_given():
    wanted = (line.split("=") for line in (PROJECT / "cluster" / "high_throughput.env").read_text().splitlines())
    told = {words[0]: words[1] for words in wanted if len(words) == 2}
    assert "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD" in told
    assert told.items() <= environment(HAPROXY).items()
    assert environment(DEFAULT) == {}


def test_the_meter_finds_who_is_busy():
    busy = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while True: pass', 'ray::ProxyActor'])"
    process = subprocess.Popen([sys.executable, "-c", busy])
    try:
        while not psutil.Process(process.pid).children():
            time.sleep(0.05)
        meter, end = Meter(process.pid), time.monotonic() + 30
        while (usage := meter.stop()).by_kind["proxy"] < 0.2:
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.wait(timeout=10)
    assert usage.busiest == "proxy"


def test_a_simulated_configuration_is_the_real_one_with_times():
    shipped = yaml.safe_load((PROJECT / "serve_config.yaml").read_text())
    config = simulated(shipped, {"sd15": {"forward_s": 0.5}})
    runs = {one["name"]: one["import_path"] for one in config["applications"]}
    assert [name for name, path in runs.items() if path == SIMULATED_IMPORT] == ["model-sd15"]
    assert config["applications"][0]["args"]["forward_s"] == 0.5
    assert real(config) == shipped
    assert Deployment.model_validate(real(config))


def test_a_simulated_family_takes_the_time_that_it_is_given():
    import torch

    from bench.simulated import SimulatedModel, SimulatedSettings

    settings = SimulatedSettings(
        name="one",
        source=str(PROJECT / "models/embedded/sd15"),
        device="cpu",
        forward_s=0.05,
        row_s=0.02,
        picture_s=0.03,
    )
    assert isinstance(settings, ModelSettings)
    family = SimulatedModel.load(settings)
    began = time.monotonic()
    predicted = family.predict(torch.rand(4, 4, 16, 16), torch.zeros(4), None)
    assert 0.13 <= time.monotonic() - began < 1.0
    assert predicted.shape == (4, 4, 16, 16)
    began = time.monotonic()
    pictures = family.autoencoder.decode(torch.rand(2, 4, 16, 16))
    assert 0.06 <= time.monotonic() - began < 1.0
    assert pictures.shape == (2, 3, 128, 128)
    assert 0 <= pictures.min() < pictures.max() <= 1


async def run_short(cases: list[Case]) -> bytes:
    """Measures two replicas. Gives one of the free model's pictures."""
    async with (
        Fleet(TIMES, **SETTINGS) as fleet,
        Crowd(fleet.address, Meter(fleet.pid)) as crowd,
        httpx2.AsyncClient(base_url=fleet.address, timeout=60) as client,
    ):
        body = {"prompt": "a red circle", "model": FREE, "steps": 1, "cache": False}
        answer = await client.post("/v1/generate", json=body, headers={"Accept": "image/png"})
        profile = Profile(name=DEFAULT, plan=SHORT, fleet=fleet, crowd=crowd, cases=cases, say=lambda _: None)
        await profile.gateways()
        await profile.replicas(SHORT.sizes[DEFAULT])
    return answer.raise_for_status().content


@pytest.mark.long
def test_the_real_server_scales_with_simulated_replicas(tmp_path: Path):
    from bench.simulated import picture

    cases: list[Case] = []
    drawn = asyncio.run(run_short(cases))
    write(tmp_path / "scale.json", cases, Machine.here(1))
    shown = np.asarray(Image.open(io.BytesIO(drawn))) / 255
    assert np.abs(shown - picture(128, 128).permute(1, 2, 0).numpy()).max() <= 1 / 255
    assert [case.load for case in cases] == [*QUERIES, CLOSED, OPEN, CLOSED, OPEN]
    assert [(case.load, case.reading.failed) for case in cases if case.reading.failed] == []
    assert all(case.reading.latency_s for case in cases if case.load in (CLOSED, OPEN))
    one, two = (case for case in cases if case.load == CLOSED)
    assert (one.replicas, two.replicas) == (1, 2)
    # A replica draws 4 pictures of 20 steps of 0.1 s at a time: 2 a second, less on a crowded machine, and never more.
    assert one.reading.per_s < 2.5
    assert two.reading.per_s > 1.2 * one.reading.per_s
    assert {"gateway", "proxy", "model", "controller", "client"} <= one.reading.usage.by_kind.keys()
    assert all(case.mib > 100 for case in cases)
    assert len(json.loads((tmp_path / "scale.json").read_text())["cases"]) == len(cases) == SHORT.readings
    assert [sheet.rows for sheet in sheets(cases)]


def test_more_replicas_than_the_memory_holds_are_told_and_not_started():
    free_mib = psutil.virtual_memory().available / 2**20
    assert has_room(2, free_mib / 10)
    assert not has_room(2, free_mib)
    assert left_out(SHORT, [case(CLOSED, 1, 2.0)]) == ["default: the memory has no room for 2 replicas."]
