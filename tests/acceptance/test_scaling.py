"""A model that falls asleep and is woken by whoever asks for it; many calls of a model within one request."""

import base64
import hashlib
from collections.abc import Callable
from typing import Any

import httpx2
import psutil

from tests.acceptance.conftest import Server
from tests.acceptance.test_deploy import Change, application, deploy, states, wait

__all__ = ["deploy"]  # a fixture

CALLS = 12
SLEEPER = "model-sd21"
SHORT = {"look_back_period_s": 1.5, "downscale_to_zero_delay_s": 1}


def state(server: Server) -> str:
    return httpx2.get(f"{server.address}/v1/models/sd21", timeout=30).json()["state"]


def test_a_model_falls_asleep_and_the_first_request_after_that_is_answered(
    server: Server, deploy: Callable[[Change], None]
):
    def light_sleeper(config: dict[str, Any]) -> None:
        [options] = application(config, SLEEPER)["deployments"]
        options["autoscaling_config"] = options["autoscaling_config"] | SHORT  # a new one: the upscaler shares the old

    assert server.post(steps=1, model="sd21").status_code == 200
    others = {process.pid for name in ("gateway", "model-sd15", "model-sdxl") for process in server.replicas(name)}
    deploy(light_sleeper)
    wait(lambda: state(server) == "cold" and not states(server, SLEEPER))
    asleep = server.post(steps=1, model="sd21", seed=1, **{"async": "when_cold"})
    assert asleep.status_code == 202
    woken = server.post(steps=1, model="sd21", seed=1)  # by the job or by this: it waits, and is no error
    assert woken.status_code == 200, woken.text
    job = httpx2.get(f"{server.address}{asleep.headers['location']}", headers={"prefer": "wait=60"}, timeout=90).json()
    assert job["status"] == "succeeded", job
    drawn = base64.b64decode(woken.json()["images"][0]["base64"])
    assert job["result"]["images"][0]["sha256"] == hashlib.sha256(drawn).hexdigest()
    wait(lambda: state(server) == "cold")
    assert others <= set(psutil.pids())


def test_many_calls_within_one_request_are_all_answered(server: Server, deploy: Callable[[Change], None]):
    """With Serve's base class alone all but one would wait for ever: calls within one request share an id."""

    def beside_the_gateway(config: dict[str, Any]) -> None:
        fan_out = {"name": "fan-out", "route_prefix": "/fan-out", "import_path": "tests.acceptance.fan_out:app"}
        config["applications"].append(fan_out)

    deploy(beside_the_gateway)
    wait(lambda: states(server, "fan-out") == ["RUNNING"])
    answer = httpx2.get(f"{server.address}/fan-out?calls={CALLS}", timeout=60)
    assert answer.json() == list(range(CALLS))
