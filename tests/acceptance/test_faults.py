"""Overload and death: refusals say when to come back, a killed replica is replaced, nothing hangs."""

import threading
import time
from contextlib import ExitStack

import httpx2

from tests.acceptance.conftest import Server

RECOVERY_S = 30.0


def test_an_overfull_queue_says_when_to_come_back(server: Server):
    with ExitStack() as streams:
        refused = None
        for seed in range(12):
            body = {"prompt": "a red circle", "steps": 150, "samples": 16, "stream": True, "seed": seed}
            request = httpx2.stream("POST", f"{server.address}/v1/generate", json=body, timeout=60)
            answer = streams.enter_context(request)
            if answer.status_code != 200:
                refused = answer
                answer.read()
                break
        assert refused is not None, "12 x 16 pictures were taken on"
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["retryable"] is True
    assert server.post(steps=2).status_code == 200  # the others have left with their clients


def test_a_killed_replica_is_replaced_and_nothing_hangs(server: Server):
    answers: dict[int, httpx2.Response] = {}

    def ask(seed: int) -> None:
        answers[seed] = server.post(steps=60, seed=seed)

    expected = server.post(steps=60, seed=0).json()["images"]
    asking = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in asking:
        thread.start()
    time.sleep(0.5)
    (replica,) = server.replicas("model-sd15")
    replica.kill()
    killed = time.monotonic()
    while server.post(steps=1).status_code != 200:
        time.sleep(0.5)
    recovered = time.monotonic() - killed
    for thread in asking:
        thread.join(timeout=120)
    assert recovered < RECOVERY_S
    assert len(answers) == 4, "a request hangs"
    for answer in answers.values():
        assert answer.status_code == 200 or answer.json()["error"]["retryable"], answer.text
    if answers[0].status_code == 200:  # sent again with the same seed
        assert answers[0].json()["images"][0]["seed"] == expected[0]["seed"]
