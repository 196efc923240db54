"""A short run on real raylets: a node dies and one is drained under load, and no request fails."""

import asyncio

import pytest

from tests.nodes.run import run


@pytest.mark.timeout(400)
def test_no_request_fails_while_a_node_dies_and_another_is_drained():
    spans = asyncio.run(run(("kill", "drain"), replicas={"sd15": 2}, clients=1))
    assert [answer.fault for span in spans.values() for answer in span.failed] == []
    assert all(span.answers for span in spans.values())
