"""A batch over HTTP on the real server: its pictures are those of requests that are answered at once."""

import json
import time
from typing import Any

import httpx2

from tests.acceptance.conftest import Server
from tests.acceptance.test_jobs import difference

LINES: list[dict[str, Any]] = [
    {"prompt": f"a {colour} circle", "steps": 4, "seed": seed, "cache": False}
    for seed, colour in enumerate(("red", "green", "blue", "yellow"))
]
TIMEOUT_S = 60.0


def test_a_batch_is_drawn_like_requests(server: Server):
    address = server.address
    openai = {"method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a star", "size": "64x64", "n": 2}}
    lines = [*LINES, {"custom_id": "star", **openai}]
    sent = httpx2.post(f"{address}/v1/batches", content="\n".join(map(json.dumps, lines)), timeout=30)
    assert sent.status_code == 202, sent.text
    batch, deadline = sent.json(), time.monotonic() + TIMEOUT_S
    while batch["status"] != "completed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = httpx2.get(f"{address}/v1/batches/{batch['id']}", timeout=30).json()
    assert batch["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
    text = httpx2.get(f"{address}/v1/batches/{batch['id']}/results", timeout=30).text
    found = [json.loads(line)["response"]["body"] for line in text.splitlines()]
    assert len(found[-1]["data"]) == 2
    for line, body in zip(LINES[:2], found, strict=False):
        picture = httpx2.get(address + body["images"][0]["url"], timeout=30).content
        same = httpx2.post(f"{address}/v1/generate", json=line, headers={"accept": "image/png"}, timeout=60)
        assert difference(picture, same.content) <= 1
