"""Steps are shared: who arrives joins the next one, who is done or gone leaves it. Shown by what HTTP clients see."""

import json
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection

import pytest

from tests.acceptance.conftest import Event, Server

SIDE = 192  # steps long enough that the network does not blur them, small enough that three pictures share one
STEPS = 40


class Watcher(threading.Thread):
    """A long request that is always there; its events say how many rows each forward had."""

    def __init__(self, server: Server):
        super().__init__(daemon=True)
        self._server = server
        self.progress: list[Event] = []
        self.start()

    def run(self) -> None:
        with self._server.stream(steps=150, width=SIDE, height=SIDE) as events:
            for event in events:
                if event.name == "progress":
                    self.progress.append(event)
                if self._stopped:
                    return

    _stopped = False

    def stop(self) -> None:
        self._stopped = True
        self.join(timeout=30)

    def rows(self) -> dict[int, int]:
        return {event.data["forward"]: event.data["rows"] for event in self.progress}

    def forward(self) -> int:
        return self.progress[-1].data["forward"]

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.rows()
            time.sleep(0.005)


@pytest.fixture
def watcher(server: Server):
    watcher = Watcher(server)
    watcher.wait(lambda: len(watcher.progress) >= 3)
    yield watcher
    watcher.stop()


def test_joining_takes_one_step_and_so_does_leaving(server: Server, watcher: Watcher):
    with server.stream(steps=8, width=SIDE, height=SIDE, seed=1) as events:
        assert next(events).name == "queued"
        before = watcher.forward()
        mine = [event.data for event in events if event.name == "progress"]
    first, last = mine[0]["forward"], mine[-1]["forward"]
    watcher.wait(lambda: watcher.forward() > last)
    rows = watcher.rows()
    assert first - before <= 3  # the forward under way, the next one, and one whose news was still on its way
    assert [data["forward"] for data in mine] == list(range(first, last + 1))
    assert {rows[forward] for forward in range(first, last + 1)} == {4}
    assert rows[first - 1] == rows[last + 1] == 2


@pytest.mark.parametrize("samples", [1, 2])
def test_a_stream_that_is_closed_frees_its_rows(server: Server, watcher: Watcher, samples: int):
    with server.stream(steps=150, width=SIDE, height=SIDE, samples=samples) as events:
        watcher.wait(lambda: watcher.progress[-1].data["rows"] == 2 + 2 * samples)
        next(events)
        left = watcher.forward()
    watcher.wait(lambda: watcher.progress[-1].data["rows"] == 2)
    freed = next(forward for forward, rows in watcher.rows().items() if forward > left and rows == 2)
    assert freed - left <= 4  # what was under way, and the steps during which the news travels


@pytest.mark.parametrize("headers", [{}, {"x-request-disconnect-disabled": "?1"}], ids=["plain", "asks to go on"])
def test_a_client_that_goes_away_frees_its_rows(server: Server, watcher: Watcher, headers: dict[str, str]):
    body = {"prompt": "a red circle", "steps": 150, "width": SIDE, "height": SIDE}
    client = HTTPConnection(server.address.removeprefix("http://"), timeout=30)
    client.request("POST", "/v1/generate", json.dumps(body), {"content-type": "application/json"} | headers)
    watcher.wait(lambda: 4 in watcher.rows().values())
    left = watcher.forward()
    client.close()
    watcher.wait(lambda: watcher.progress[-1].data["rows"] == 2)
    freed = max(forward for forward, rows in watcher.rows().items() if rows == 4) + 1
    assert freed - left <= 4
