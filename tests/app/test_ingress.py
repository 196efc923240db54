"""What the gateway refuses, how it says so, and its health, on a service in memory."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app import ingress, job_runner
from app.service import Service
from app.settings import FolderSettings, GatewaySettings, RunnerSettings
from models.errors import GenerationFailed, Overloaded
from tests.app.conftest import MemoryRouter
from tests.app.loopback import until

DEEP = '{"prompt": ' + "[" * 90_000
OK = '{"prompt": "x"}'
SD15 = {"name": "sd15", "family": "sd", "source": "models/embedded/sd15"}
USER_CONFIG: dict[str, Any] = {"default_model": "sd15", "models": [SD15]}

# body, status, field, a word of the message
REFUSED = [
    ('{"prompt": "x", "promt": "y"}', 422, "promt", "unknown field"),
    ("{}", 422, "prompt", "required"),
    ('{"prompt": ""}', 422, "prompt", "empty"),
    ('{"prompt": "  "}', 422, "prompt", "empty"),
    ('{"prompt": "a\\u0000b"}', 422, "prompt", "NUL"),
    (json.dumps({"prompt": "x" * 10_001}), 422, "prompt", "10000"),
    ('{"prompt": 7}', 422, "prompt", "string"),
    ('{"prompt": "x", "steps": 0}', 422, "steps", "between 1 and 150"),
    ('{"prompt": "x", "steps": 1000000}', 422, "steps", "between 1 and 150"),
    ('{"prompt": "x", "steps": 2.5}', 422, "steps", "integer"),
    ('{"prompt": "x", "steps": "20"}', 422, "steps", "integer"),
    ('{"prompt": "x", "steps": true}', 422, "steps", "integer"),
    ('{"prompt": "x", "guidance_scale": "7"}', 422, "guidance_scale", "number"),
    ('{"prompt": "x", "guidance_scale": -1}', 422, "guidance_scale", "between 0.0 and 50.0"),
    ('{"prompt": "x", "guidance_scale": 51}', 422, "guidance_scale", "between 0.0 and 50.0"),
    ('{"prompt": "x", "width": 513}', 422, "width", "512 or 520"),
    ('{"prompt": "x", "width": 8}', 422, "width", "between 64"),
    ('{"prompt": "x", "height": 0}', 422, "height", "between 64"),
    ('{"prompt": "x", "width": 65536}', 422, "width", "between 64"),
    ('{"prompt": "x", "width": 1032, "height": 1024}', 422, "width", "1048576"),
    ('{"prompt": "x", "samples": 0}', 422, "samples", "between 1 and 16"),
    ('{"prompt": "x", "samples": 17}', 422, "samples", "between 1 and 16"),
    ('{"prompt": "x", "seed": -1}', 422, "seed", "between 0"),
    ('{"prompt": "x", "seed": 18446744073709551616}', 422, "seed", "integer"),
    ('{"prompt": "x", "sampler": "magic"}', 422, "sampler", "dpmpp_2m"),
    ('{"prompt": "x", "sampler": "ddim", "schedule": "karras"}', 422, "schedule", "sgm_uniform"),
    ('{"prompt": "x", "output_format": "gif"}', 422, "output_format", "png"),
    ('{"prompt": "x", "priority": "now"}', 422, "priority", "interactive"),
    ('{"prompt": "x", "deadline_s": 0}', 422, "deadline_s", "between 0.1"),
    ('{"prompt": "x", "denoise_strength": 0.5}', 422, "denoise_strength", "image"),
    ('{"prompt": "x", "image": "####"}', 422, "image", "base64"),
    ('{"prompt": "x", "image": "http://127.0.0.1/a.png"}', 422, "image", "fetches no pictures"),
    ('{"prompt": "x", "image": "AAAA"}', 422, "image", "PNG"),
    ('{"prompt": "x", "image": "data:image/png,AAAA"}', 422, "image", "data URI"),
    ('{"prompt": "x", "model": "nope"}', 404, None, "sd15, sdxl"),
    ('{"prompt": "x", "model": "../../etc"}', 404, None, "sd15, sdxl"),
    ('{"prompt": "x", "guidance_scale": NaN}', 400, "body", "JSON"),
    ('{"prompt": "x", "guidance_scale": Infinity}', 400, "body", "JSON"),
    ('{"prompt": "\\ud800"}', 400, "body", "JSON"),
    ("{not json", 400, "body", "JSON"),
    ("", 400, "body", "JSON"),
    ("[]", 400, "body", "object"),
    ("null", 400, "body", "object"),
    (DEEP, 400, "body", "JSON"),
    (json.dumps({"prompt": "x" * 200_000}), 413, "body", "100000"),
]


@pytest.mark.parametrize(("body", "status", "field", "word"), REFUSED, ids=[case[0][:60] for case in REFUSED])
async def test_a_bad_body_is_refused_by_name(
    client: httpx2.AsyncClient, body: str, status: int, field: str | None, word: str
):
    answer = await client.post("/v1/generate", content=body.encode())
    error = answer.json()["error"]
    assert (answer.status_code, error.get("field")) == (status, field), answer.text[:300]
    assert word in error["message"]
    assert error["retryable"] is False
    assert len(answer.text) < 2000


async def test_infinity_by_exponent_is_refused(client: httpx2.AsyncClient):
    answer = await client.post("/v1/generate", content=b'{"prompt": "x", "guidance_scale": 1e999}')
    assert answer.status_code in (400, 422)


async def test_a_body_that_grows_beyond_the_limit_is_refused(client: httpx2.AsyncClient):
    async def chunks():
        for _ in range(40):
            yield b" " * 10_000

    answer = await client.post("/v1/generate", content=chunks())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


async def test_content_type_and_authorization_are_not_looked_at(client: httpx2.AsyncClient):
    headers = {"content-type": "application/x-pickle", "authorization": "Bearer anything"}
    assert (await client.post("/v1/generate", content=OK.encode(), headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (Overloaded(2.3), 429, "overloaded", "3"),
        (GenerationFailed("deadline"), 504, "deadline", None),
        (GenerationFailed("replica_lost"), 503, "replica_lost", "5"),
        (GenerationFailed("out_of_memory"), 503, "out_of_memory", "5"),
        (GenerationFailed("engine_fault"), 503, "engine_fault", "5"),
        (GenerationFailed("nan_latents"), 500, "nan_latents", None),
        (GenerationFailed("constant_picture"), 500, "constant_picture", None),
    ],
)
async def test_a_failure_is_a_status(
    client: httpx2.AsyncClient, router: MemoryRouter, error, status, code, retry_after
):
    router.refusal = error
    for stream in (False, True):
        answer = await client.post("/v1/generate", json={"prompt": "x", "stream": stream})
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code
        assert answer.json()["error"]["retryable"] is (retry_after is not None)
        assert answer.headers.get("retry-after") == retry_after


async def test_a_failure_in_a_stream_is_an_event(client: httpx2.AsyncClient, router: MemoryRouter):
    router.failure = GenerationFailed("nan_latents", "not finite")
    answer = await client.post("/v1/generate", json={"prompt": "x", "stream": True})
    assert answer.status_code == 200
    name, data = answer.text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "nan_latents"


async def test_our_own_mistake_shows_no_trace(client: httpx2.AsyncClient, router: MemoryRouter):
    router.failure = ZeroDivisionError("secret")  # pyright: ignore[reportAttributeAccessIssue]
    answer = await client.post("/v1/generate", json={"prompt": "x"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"


async def test_a_client_that_goes_away_takes_its_request_along(client: httpx2.AsyncClient, router: MemoryRouter):
    router.gate.clear()
    before = router.left
    for stream in (False, True):
        asking = asyncio.create_task(client.post("/v1/generate", json={"prompt": "x", "stream": stream}))
        await until(lambda: router.running, 20)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: not router.running, 20)
    assert router.left == before + 2


async def test_health_and_readiness_differ(client: httpx2.AsyncClient, router: MemoryRouter):
    router.states["sd15"] = "loading"
    assert (await client.get("/healthz")).status_code == 200
    answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["reason"] == "model sd15 is loading"


async def test_unknown_paths_and_methods_have_the_same_shape(client: httpx2.AsyncClient):
    assert (await client.get("/nope")).json()["error"]["code"] == "not_found"
    answer = await client.get("/v1/generate")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


async def test_the_documentation_shows_fields_and_ranges(client: httpx2.AsyncClient):
    schema = (await client.get("/openapi.json")).json()
    content = schema["paths"]["/v1/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert content["properties"]["steps"]["maximum"] == 150
    assert content["required"] == ["prompt"]
    assert (await client.get("/docs")).status_code == 200


async def test_a_body_that_does_not_arrive_is_not_waited_for(service: Service):
    async def chunks():
        for _ in range(10):
            yield b" "
            await asyncio.sleep(0.1)
        yield OK.encode()

    app = ingress.build(service, GatewaySettings(), lambda: asyncio.sleep(0, None), body_s=0.3)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        answer = await client.post("/v1/generate", content=chunks())
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "body_too_slow")


async def test_a_body_that_has_arrived_may_take_long_to_draw(service: Service, router: MemoryRouter):
    app = ingress.build(service, GatewaySettings(), lambda: asyncio.sleep(0, None), body_s=0.1)
    router.gate.clear()
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        asking = asyncio.create_task(client.post("/v1/generate", content=OK.encode()))
        await asyncio.sleep(0.4)
        router.gate.set()
        assert (await asking).status_code == 200


async def test_a_process_without_models_yet_asks_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where a controller died while the gateway started: its successor sends requests there at once."""
    gateway = ingress.Gateway(
        GatewaySettings(database=f"sqlite:///{tmp_path}/x.db", secret_file=str(tmp_path / "secret"))
    )
    transport = httpx2.ASGITransport(gateway.__serve_build_asgi_app__())
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answers = [await client.post("/v1/generate", content=OK), await client.get("/v1/models")]
        answers.append(await client.post("/v1/generate", json={"prompt": "x", "model": "sd15"}))
    assert [answer.status_code for answer in answers] == [503] * 3
    assert all(answer.headers["retry-after"] and answer.json()["error"]["retryable"] for answer in answers)
    gateway.check_health()
    monkeypatch.setattr(ingress, "START_S", 0.0)
    with pytest.raises(RuntimeError, match="not told its models"):
        gateway.check_health()
    await gateway.reconfigure(USER_CONFIG)
    gateway.check_health()
    await gateway._database.close()


class Runner(job_runner.JobRunner):
    """Serve awaits what Python, when it throws the runner away, would only call."""

    def __del__(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        pass


async def test_a_runner_that_never_begins_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderSettings(kind="folder", path=str(tmp_path / "pictures"))
    database, secret = f"sqlite:///{tmp_path}/x.db", str(tmp_path / "secret")
    runner = Runner(RunnerSettings(store=store, database=database, secret_file=secret))
    runner.check_health()
    monkeypatch.setattr(job_runner, "START_S", 0.0)
    with pytest.raises(RuntimeError, match="could not begin"):
        runner.check_health()
    await job_runner.JobRunner.__del__(runner)
