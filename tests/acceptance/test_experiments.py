"""An experiment on the running server, with two real models as its arms: put there, watched, changed and removed
in place, through Serve's REST API."""

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import yaml
from PIL import Image

from tests.acceptance.conftest import Server
from tests.acceptance.test_cli import heliograph
from tests.acceptance.test_deploy import application, wait

USERS = [f"user-{n}" for n in range(16)]
EXPERIMENT: dict[str, Any] = {
    "unit": "user",
    "header": "X-Try=bigger",  # nobody else's requests are in
    "arms": {
        "control": {"steps": 2},
        "bigger": {"model": "sdxl", "steps": 3},
        "beside": {"shadow": True, "steps": 1},
    },
    "guard": {"max_error_rate": 0.5},
}


def put(server: Server, **experiments: Any) -> None:
    """Gives gateway and runners these experiments; waits until the gateway has them."""
    config = yaml.safe_load(server.config.read_text())
    for name in ("gateway", "jobs"):
        application(config, name)["deployments"][0]["user_config"]["experiments"] = experiments
    answer = httpx2.put(f"{server.dashboard}/api/serve/applications/", json=config, timeout=60)
    assert answer.status_code == 200, answer.text
    weights = {name: {arm: s.get("weight", 1) for arm, s in e["arms"].items()} for name, e in experiments.items()}
    wait(lambda: offered(server) == weights, 60)


def offered(server: Server) -> dict[str, dict[str, float]]:
    listed = httpx2.get(f"{server.address}/v1/experiments", timeout=30).json()["data"]
    return {one["name"]: {name: arm["weight"] for name, arm in one["arms"].items()} for one in listed}


def counted(server: Server, arm: str) -> float:
    """How many requests of an arm Ray's metrics tell of."""
    told = 0.0
    for targets in httpx2.get(f"{server.dashboard}/api/prometheus/sd", timeout=30).json():
        for target in targets["targets"]:
            text = httpx2.get(f"http://{target}/metrics", timeout=30).text
            found = re.findall(r"^ray_heliograph_exposures_total\{(.*)\} (\S+)$", text, re.M)
            told += sum(float(value) for tags, value in found if f'arm="{arm}"' in tags and 'outcome="drawn"' in tags)
    return told


@pytest.fixture(scope="module")
def experiment(server: Server) -> Iterator[Server]:
    put(server, bigger=EXPERIMENT)
    yield server
    put(server)


def ask(server: Server, user: str, **body: Any) -> httpx2.Response:
    headers = {"X-User-Id": user, "X-Try": "bigger"}
    request = {"prompt": "a red circle on a blue background", "cache": False} | body
    return httpx2.post(f"{server.address}/v1/generate", json=request, headers=headers, timeout=120)


def draw(server: Server, user: str, **body: Any) -> dict[str, Any]:
    answer = ask(server, user, **body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    if "experiments" in told:
        assert answer.headers["x-experiment"] == f"bigger={told['experiments'][0]['arm']}"
    return told


def arm_of(told: dict[str, Any]) -> str:
    [use] = told["experiments"]
    return use["arm"]


def report(server: Server) -> dict[str, dict[str, Any]]:
    told = httpx2.get(f"{server.address}/v1/experiments/bigger", timeout=30).json()
    return {arm["name"]: arm for arm in told["arms"]}


def test_arms_are_two_models_that_stick_to_users_and_what_came_of_them_is_reported(experiment: Server):
    with ThreadPoolExecutor(4) as threads:
        first = list(threads.map(lambda user: draw(experiment, user, metadata="full"), USERS))
        again = list(threads.map(lambda user: arm_of(draw(experiment, user)), USERS[:6]))
    arms = dict(zip(USERS, map(arm_of, first), strict=True))
    assert set(arms.values()) == {"control", "bigger"}
    assert again == [arms[user] for user in USERS[:6]]
    for told in first:
        drawn = {"control": ("sd15", 2), "bigger": ("sdxl", 3)}[arm_of(told)]
        assert (told["model"], told["parameters"]["steps"]) == drawn
        picture = Image.open(io.BytesIO(base64.b64decode(told["images"][0]["base64"])))
        assert json.loads(picture.info["heliograph"])["experiments"] == told["experiments"]
        if arm_of(told) == "bigger":
            kept = {"id": told["receipt_id"], "outcome": "kept"}
            said = httpx2.post(f"{experiment.address}/v1/feedback", json=kept, timeout=30)
            assert said.json()["experiments"] == told["experiments"], said.text
    wait(lambda: report(experiment)["beside"]["exposures"] > 0, 30)
    found = report(experiment)
    for arm in ("control", "bigger"):
        units = sum(a == arm for a in arms.values())
        drawings = units + sum(arms[user] == arm for user in USERS[:6])
        told = found[arm]
        assert (told["units"], told["assigned"], told["exposures"], told["errors"]) == (units, units, drawings, 0)
        assert told["p95_s"] >= told["p50_s"] > 0
        assert told["engine_s"] > 0
    assert found["beside"]["assigned"] == 0
    assert found["control"]["outcomes"]["kept"]["mean"] == 0.0
    # Those of the first six who drew twice kept one of two.
    twice = sum(arms[user] == "bigger" for user in USERS[:6])
    bigger = sum(a == "bigger" for a in arms.values())
    assert found["bigger"]["outcomes"]["kept"]["mean"] == pytest.approx((bigger - twice / 2) / bigger)
    assert found["bigger"]["outcomes"]["kept"]["difference"]["estimate"] > 0
    wait(lambda: counted(experiment, "bigger") == found["bigger"]["exposures"], 60)


def test_the_command_lists_and_reports(experiment: Server):
    listed = heliograph("experiments", "list", "--address", experiment.address)
    assert listed.returncode == 0, listed.stderr
    assert "model=sdxl" in listed.stdout
    told = heliograph("experiments", "report", "bigger", "--address", experiment.address)
    assert told.returncode == 0, told.stderr
    assert "bigger, kept:" in told.stdout
    assert "●" in told.stdout
    missing = heliograph("experiments", "report", "smaller", "--address", experiment.address)
    assert (missing.returncode, "there are: bigger" in missing.stderr) == (1, True)


def test_a_job_is_assigned_when_it_is_submitted(experiment: Server):
    submitted = ask(experiment, "a job's", **{"async": True})
    assert submitted.status_code == 202, submitted.text
    job = submitted.json()
    done = httpx2.get(f"{experiment.address}{job['urls']['self']}", headers={"prefer": "wait=60"}, timeout=90).json()
    assert done["experiments"] == job["experiments"] == done["result"]["experiments"]
    assert done["model"] == {"control": "sd15", "bigger": "sdxl"}[arm_of(job)]
    said = httpx2.post(
        f"{experiment.address}/v1/feedback", json={"id": job["job_id"], "outcome": "rating", "value": 5}, timeout=30
    )
    assert said.json()["experiments"] == job["experiments"], said.text


def test_weights_change_in_place_under_load(experiment: Server):
    gateways = {process.pid for process in experiment.replicas("gateway")}
    before = {user: arm_of(draw(experiment, user)) for user in USERS}
    statuses: list[int] = []
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            statuses.append(ask(experiment, USERS[len(statuses) % len(USERS)]).status_code)

    with ThreadPoolExecutor(2) as threads:
        loading = [threads.submit(load) for _ in range(2)]
        try:
            wait(lambda: len(statuses) > 2)
            heavier = EXPERIMENT["arms"] | {"bigger": EXPERIMENT["arms"]["bigger"] | {"weight": 4}}
            put(experiment, bigger=EXPERIMENT | {"arms": heavier})
            before_it = len(statuses)
            wait(lambda: len(statuses) > before_it + 2)
        finally:
            over.set()
        for one in loading:
            one.result()
    assert set(statuses) == {200}
    assert {process.pid for process in experiment.replicas("gateway")} == gateways
    after = {user: arm_of(draw(experiment, user)) for user in USERS}
    moved = {(before[user], after[user]) for user in USERS if before[user] != after[user]}
    assert moved == {("control", "bigger")}  # nobody left the arm that grew
