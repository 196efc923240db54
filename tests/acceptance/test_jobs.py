"""Jobs on the real server: submitted, watched, cancelled, tried again; and none is lost when a process is killed."""

import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import yaml
from PIL import Image

from bench.serving import PROJECT
from tests.acceptance.conftest import ENVIRONMENT, MAX_ROWS, Server, serving

DRAW: dict[str, Any] = {"prompt": "a red circle on a blue background", "seed": 7, "async": True, "cache": False}
LONG = DRAW | {"steps": 80, "width": 192, "height": 192}  # seconds, so that something can happen meanwhile
RUNS_AGAIN_S = 15.0


def submit(address: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = httpx2.post(f"{address}/v1/generate", json=body, headers=names, timeout=90)
    assert answer.status_code in (200, 202), answer.text
    return answer.json()


def job(address: str, id: str, wait_s: int | None = None) -> dict[str, Any]:
    headers = {} if wait_s is None else {"prefer": f"wait={wait_s}"}
    answer = httpx2.get(f"{address}/v1/jobs/{id}", headers=headers, timeout=90)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ended(address: str, id: str) -> dict[str, Any]:
    """The job once it has ended, on a machine that may be slow."""
    return until(lambda: found if (found := job(address, id, wait_s=60))["finished_at"] else None, 180.0)


def until(look: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)
    return found


def begun(address: str, id: str, attempt: int = 1) -> bool:
    """Whether an attempt has told of a step."""
    found = job(address, id)
    assert not found["finished_at"], found
    return found["attempt"] >= attempt and found["progress"] is not None


def picture(address: str, done: dict[str, Any]) -> bytes:
    assert done["status"] == "succeeded", done
    answer = httpx2.get(address + done["result"]["images"][0]["url"], timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.content


def difference(one: bytes, other: bytes) -> int:
    """The largest at any pixel: who else shares the forwards may change a picture by 1 of 255."""
    first, second = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16) for data in (one, other))
    return int(np.abs(first - second).max())


def test_a_job_is_drawn_like_a_request_and_its_events_are_taken_up(server: Server):
    address = server.address
    made = submit(address, DRAW, idempotency_key="first")
    assert submit(address, DRAW, idempotency_key="first")["job_id"] == made["job_id"]
    done = job(address, made["job_id"], wait_s=60)
    same = httpx2.post(
        f"{address}/v1/generate",
        json={"prompt": DRAW["prompt"], "seed": 7},
        headers={"accept": "image/png"},
        timeout=60,
    )
    assert difference(picture(address, done), same.content) <= 1
    assert done["result"]["parameters"]["seed"] == 7
    events = events_of(address, made["job_id"])
    assert events_of(address, made["job_id"], {"last-event-id": "2"}) == events[2:]
    assert '"status":"succeeded"' in events[-1]


def events_of(address: str, job_id: str, headers: Mapping[str, str] | None = None) -> list[str]:
    """A job's events but for the signatures of addresses, which are those of the second in which one asks."""
    answer = httpx2.get(f"{address}/v1/jobs/{job_id}/events", headers=headers, timeout=30)
    return re.sub(r"\?expires=\d+&signature=\w+", "", answer.text).strip().split("\n\n")


def test_jobs_are_cancelled_while_they_run_and_while_they_wait_and_tried_again(server: Server):
    address = server.address
    running = submit(address, LONG)["job_id"]
    until(lambda: begun(address, running))
    told = time.monotonic()
    assert httpx2.post(f"{address}/v1/jobs/{running}/cancel", timeout=30).json()["status"] == "cancelling"
    assert job(address, running, wait_s=30)["status"] == "cancelled"
    assert time.monotonic() - told < 5.0
    crowd = [submit(address, LONG | {"seed": seed})["job_id"] for seed in range(9)]  # one more than run at once
    waiting = httpx2.post(f"{address}/v1/jobs/{crowd[-1]}/cancel", timeout=30).json()
    assert (waiting["status"], waiting["attempt"]) == ("cancelled", 0)
    for id in crowd:
        httpx2.post(f"{address}/v1/jobs/{id}/cancel", timeout=30)
    again = httpx2.post(f"{address}/v1/jobs/{crowd[-1]}/retry", timeout=30)
    assert (again.status_code, again.json()["retry_of"]) == (202, crowd[-1])
    httpx2.post(f"{address}/v1/jobs/{again.json()['job_id']}/cancel", timeout=30)
    for id in (*crowd, again.json()["job_id"]):
        assert job(address, id, wait_s=30)["status"] == "cancelled"


def test_a_job_of_a_killed_runner_or_replica_runs_again_and_gives_the_same_picture(server: Server):
    address = server.address
    undisturbed = picture(address, ended(address, submit(address, LONG)["job_id"]))
    for application in ("jobs", "model-sd15"):
        id = submit(address, LONG)["job_id"]
        until(lambda id=id: begun(address, id))
        [process] = server.replicas(application)
        process.kill()
        killed = time.monotonic()
        until(lambda id=id: job(address, id)["attempt"] >= 2)
        assert time.monotonic() - killed < RUNS_AGAIN_S, application
        until(lambda id=id: job(address, id)["progress"] or job(address, id)["finished_at"])
        done = ended(address, id)
        assert difference(picture(address, done), undisturbed) <= 1, application
        assert done["attempt"] == 2, application


def test_the_command_makes_and_shows_jobs(server: Server):
    def heliograph(*arguments: str) -> str:
        command = [sys.executable, "-m", "app.cli", *arguments, "--address", server.address]
        ran = subprocess.run(command, cwd=PROJECT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    id = heliograph("generate", "a red circle", "--steps", "2", "--async").strip()
    assert '"status": "succeeded"' in heliograph("jobs", "show", id, "--wait", "60")
    assert id in heliograph("jobs", "list", "--status", "succeeded", "--limit", "3")
    assert '"status": "succeeded"' in heliograph("jobs", "cancel", id)


def test_jobs_outlive_the_server(tmp_path: Path):
    raw = yaml.safe_load((PROJECT / "serve_config.yaml").read_text().replace("data/", f"{tmp_path}/data/"))
    model, jobs, gateway = (raw["applications"][i] for i in (0, -2, -1))
    model["args"]["max_rows"] = MAX_ROWS
    jobs["args"]["max_running"] = 1
    gateway["deployments"][0]["user_config"] |= {"default_model": "sd15", "models": [model["args"]], "upscaler": None}
    config = tmp_path / "serve_config.yaml"
    config.write_text(yaml.safe_dump(raw | {"applications": [model, jobs, gateway]}))
    with serving(config, tmp_path / "log-1") as (_, address):
        made = [submit(address, LONG | {"seed": seed})["job_id"] for seed in range(2)]
        until(lambda: begun(address, made[0]))
    with serving(config, tmp_path / "log-2") as (_, address):
        done = [ended(address, id) for id in made]
    assert [found["status"] for found in done] == ["succeeded"] * 2
    assert all(found["error"] is None for found in done)
    assert [found["attempt"] for found in done] == [2, 1], "the one that ran was handed back, the other waited"


def test_a_synchronous_request_with_a_key_is_made_once(server: Server):
    body, headers = {"prompt": "a red circle", "steps": 60}, {"idempotency-key": "sync"}
    answers: list[httpx2.Response] = []

    def ask() -> None:
        answers.append(httpx2.post(f"{server.address}/v1/generate", json=body, headers=headers, timeout=60))

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409]
    ask()
    [first] = [answer for answer in answers[:3] if answer.status_code == 200]
    assert (answers[3].headers["idempotency-replayed"], answers[3].json()) == ("true", first.json())
