"""What the real server does with requests that mean no good: through Ray's proxy, byte by byte, and fast."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.acceptance.conftest import Server

ANSWERED_S = 5.0  # a refusal takes no model


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    place = urlsplit(server.address)
    with socket.create_connection((place.hostname, place.port), ANSWERED_S) as connection:
        yield connection


def raw(server: Server, request: bytes) -> bytes:
    """What is answered to these bytes until the server closes the connection or says no more; mostly the head."""
    with connected(server) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
                if b"\r\n\r\n" in answer:
                    break
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


def status(answer: bytes) -> int:
    """The status of an answer, 0 where the connection was closed without one."""
    return int(answer.split(b" ", 2)[1]) if answer else 0


def lives(server: Server) -> bool:
    started = time.monotonic()
    answer = httpx2.get(f"{server.address}/healthz", timeout=ANSWERED_S)
    return answer.status_code == 200 and time.monotonic() - started < ANSWERED_S


DEEP = b'{"prompt": "x", "controls": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

# body, the statuses that will do, the field
JSON = {
    "nested 100,000 deep": (DEEP, (400,), "body"),
    "NaN": (b'{"prompt": "x", "guidance_scale": NaN}', (400,), "body"),
    "a number beyond all": (b'{"prompt": "x", "guidance_scale": 1e999}', (400, 422), None),
    "a lone surrogate": (b'{"prompt": "\\ud800"}', (400,), "body"),
    "a lone surrogate in UTF-8": (b'{"prompt": "\xed\xa0\x80"}', (400,), "body"),
    "bytes that are no UTF-8": (b'{"prompt": "\xff\xfe"}', (400,), "body"),
    "NUL": (b'{"prompt": "a\\u0000b"}', (422,), "prompt"),
    "NUL in a name": (b'{"prompt": "x", "model": "a\\u0000b"}', (404, 422), None),
    "NUL in a field's name": (b'{"prompt": "x", "a\\u0000b": 1}', (422,), "a\0b"),
    "a seed of 5,000 digits": (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", (400, 422), None),
    "2^64": (b'{"prompt": "x", "seed": 18446744073709551616}', (422,), "seed"),
    "a number as text": (b'{"prompt": "x", "steps": "20"}', (422,), "steps"),
    "a megabyte of prompt": (json.dumps({"prompt": "x" * 1_000_000}).encode(), (422,), "prompt"),
    "a traversal for a model": (b'{"prompt": "x", "model": "../../etc/passwd"}', (404, 422), None),
    "a traversal for a LoRA": (b'{"prompt": "x", "adapters": [{"name": "../../moon"}]}', (404, 422), None),
    "two bodies": (b'{"prompt": "x"}{"prompt": "y"}', (400,), "body"),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), (400,), "body"),
}


@pytest.mark.parametrize("kind", JSON)
def test_json_that_means_no_good_is_refused_at_once(server: Server, kind: str) -> None:
    body, statuses, field = JSON[kind]
    answer = httpx2.post(f"{server.address}/v1/generate", content=body, timeout=ANSWERED_S)
    assert answer.status_code in statuses, answer.text[:300]
    assert len(answer.text) < 2000
    if field is not None:
        assert answer.json()["error"]["field"] == field


def post(*headers: str, body: bytes = b"") -> bytes:
    lines = ["POST /v1/generate HTTP/1.1", "host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n"
CHUNK = b'f\r\n{"prompt": ""}\r\n0\r\n\r\n'

# bytes on the wire; each has to be refused (400 to 499) or hung up on, and what is smuggled in never answered
FRAMING = {
    "two lengths that differ": post("content-length: 4", "content-length: 40", body=b"{}  " + SMUGGLED),
    "a length that is no number": post("content-length: 4x", body=b"{}  "),
    "a negative length": post("content-length: -1"),
    "a length with a sign": post("content-length: +4", body=b"{}  "),
    "a length beyond all": post("content-length: 99999999999999999999999999"),
    "a length beyond the limit": post("content-length: 99999999999"),
    "an encoding that is none": post("transfer-encoding: magic", body=CHUNK),
    "chunks of no size": post("transfer-encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"),
    "a header folded over two lines": post("x-a: 1\r\n 2", "content-length: 2", body=b"{}"),
    "a header without a colon": post("nonsense", "content-length: 2", body=b"{}"),
    "a space before the colon": post("content-length : 2", body=b"{}"),
    "NUL in a header": post("x-a: a\0b", "content-length: 2", body=b"{}"),
    "64 KiB of a header": post("x-a: " + "a" * 65536, "content-length: 2", body=b"{}"),
    "10,000 headers": post(*(f"x-{n}: 1" for n in range(10_000)), "content-length: 2", body=b"{}"),
    "a path of 100,000 characters": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "no HTTP at all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n",
    "HTTP/2 to a server that was not asked": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("kind", FRAMING)
def test_requests_that_can_be_read_two_ways_are_refused(server: Server, kind: str) -> None:
    answer = raw(server, FRAMING[kind])
    assert status(answer) == 0 or 400 <= status(answer) < 500, answer[:300]
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert lives(server)


def test_a_length_beside_chunks_smuggles_nothing_in(server: Server) -> None:
    """RFC 9112, 6.1: the chunks count, and the connection ends, or it is refused."""
    both = post("content-length: 4", "transfer-encoding: chunked", body=CHUNK + SMUGGLED)
    with connected(server) as connection:
        connection.sendall(both)
        connection.settimeout(2.0)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except (TimeoutError, ConnectionResetError):
            pass
    assert 400 <= status(answer) < 500, answer[:300]
    assert b"/smuggled" not in answer


@pytest.mark.parametrize("host", ["", "evil.example", "a" * 5000, "x:99999", "[::1", "x\ty"])
def test_the_host_header_decides_nothing_but_whether_it_is_this_machines(server: Server, host: str) -> None:
    answer = raw(server, f"GET /healthz HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert status(answer) in (200, 400), answer[:300]
    assert b"evil" not in answer
    answer = raw(server, f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert status(answer) in (400, 403), answer[:300]
    assert b"evil" not in answer


def test_another_sites_page_has_nothing_drawn(server: Server) -> None:
    """By a name of its own that leads here, or across sites with a body that a browser sends without asking."""
    body = b'{"prompt": "x", "steps": 2}'
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example", "content-type": "text/plain"}):
        answer = httpx2.post(f"{server.address}/v1/generate", content=body, headers=headers, timeout=ANSWERED_S)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


def test_a_body_that_says_to_be_too_large_is_not_read(server: Server) -> None:
    answer = raw(server, post(f"content-length: {64 * 1024 * 1024}", body=b"{"))
    assert status(answer) == 413


def test_a_form_of_endless_parts_is_refused(server: Server) -> None:
    part = b'--x\r\ncontent-disposition: form-data; name="%d"\r\n\r\n1\r\n'
    parts = b"".join(part % n for n in range(100_000)) + b"--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for body in (parts, b"--x\r\n" + b"a" * 1_000_000, b"--x\r\n" + b"a: b\r\n" * 200_000):
        answer = httpx2.post(f"{server.address}/v1/img2img", content=body, headers=headers, timeout=ANSWERED_S)
        assert answer.status_code in (400, 413), answer.text[:300]
    assert lives(server)


@pytest.mark.parametrize(
    "path",
    ["/v1/models/%00", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%ed%a0%80", "/v1/images/..%2fsecret", "//"],
)
def test_a_path_leads_nowhere_else(server: Server, path: str) -> None:
    answer = raw(server, f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    assert status(answer) in (400, 403, 404, 422), answer[:300]


@pytest.mark.parametrize("sent", [b"POST /v1/gen", post("content-length: 1000", body=b"{")], ids=["headers", "body"])
def test_clients_that_never_finish_hold_up_nobody(server: Server, sent: bytes) -> None:
    """A hundred at once, each with a request that does not go on; somebody else is answered meanwhile."""
    with ExitStack() as open_ones:
        for _ in range(100):
            open_ones.enter_context(connected(server)).sendall(sent)
        assert lives(server)
        assert server.post(steps=2).status_code == 200
    assert lives(server)


def test_clients_that_do_not_read_hold_up_nobody(server: Server) -> None:
    with ExitStack() as open_ones:
        for _ in range(50):
            connection = open_ones.enter_context(connected(server))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20)
        assert lives(server)
        assert server.post(steps=2).status_code == 200
    assert lives(server)
