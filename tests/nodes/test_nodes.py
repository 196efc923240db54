"""A short run on real raylets: a node dies under load. `python -m tests.nodes` does the rest."""

import asyncio

import pytest

from tests.nodes.run import WORKERS, run


@pytest.mark.timeout(400)
def test_no_request_fails_while_a_node_dies():
    workers = {name: WORKERS[name] for name in ("a", "b")}
    span = asyncio.run(run(("kill",), replicas={"sd15": 2}, workers=workers, clients=1))["kill"]
    assert span.answers
    assert [answer.fault for answer in span.failed] == []
