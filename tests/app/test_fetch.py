"""The client against real servers on the loopback: what reaches them, what comes back, and how long it may take."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace

import httpcore2
import numpy as np
import pytest
import trustme

from app import fetch
from app.fetch import Fetcher, Response, Unreachable, retry_after_s
from app.guard import Guard
from app.keys.caller import ANONYMOUS, current
from app.settings import FetchSettings
from models.errors import InvalidRequest, Overloaded
from models.images import FORMATS, encode
from tests.app.loopback import Answer, Loopback, Request, always, never, response, serving, until

PNG = encode(np.full((8, 8, 3), 9, np.uint8), "png")
LOOPBACK = ("127.0.0.0/8", "::1/128")

# Ways to write the loopback's address, or to hide it. Those in ARRIVE reach it where nobody guards.
ARRIVE = (
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.1:{port}/",
    "http://017700000001:{port}/",
    "http://0:{port}/",
    "http://0.0.0.0:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://127.0.0.1:{port}#@example.com/",
    "http://127.0.0.1:{port}?@example.com/",
)
DO_NOT_ARRIVE = (
    "http://localhost.:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://[64:ff9b:1::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]:{port}/",
    "http://[2606:2800::5efe:7f00:1]:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://[::1%25lo]:{port}/",
    "http://example.com@127.0.0.1:{port}/",
    "http://user:secret@127.0.0.1:{port}/",
    "http://example.com\\@127.0.0.1:{port}/",
    "http://%6c%6fcalhost:{port}/",
    "http://127%2e0%2e0%2e1:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://127。0。0。1:{port}/",
    "http://ⓛocalhost:{port}/",
    "http://127.0.0.1\t:{port}/",
    "http://127.0.0.1:{port}\r\nHost: example.com/",
    "http://127.0.0.1 :{port}/",
    "http://100.64.0.1:{port}/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[::ffff:169.254.169.254]/latest/meta-data/",
    "http://100.100.100.200/latest/meta-data/",
    "http://192.0.0.192/opc/v2/instance/",
    "http://168.63.129.16/machine/",
    "file:///etc/passwd",
    "file://127.0.0.1:{port}/etc/passwd",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_GET",
    "unix:///run/docker.sock",
    "//127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http://",
    "",
)


@pytest.fixture
async def server() -> AsyncIterator[Loopback]:
    async with serving(always(body=PNG)) as loopback:
        yield loopback


def fetcher(
    *servers: Loopback, allowed: Sequence[str] = LOOPBACK, tls: ssl.SSLContext | None = None, **changes: object
):
    """A client that may reach the servers, by names too: every name is the loopback's."""
    ports = (80, *(server.port for server in servers))
    settings = FetchSettings.model_validate({"ports": ports, "allowed": allowed} | changes)

    async def loopback(_: str) -> Sequence[str]:
        return ["127.0.0.1"]

    return Fetcher(settings, Guard(settings.networks, settings.hosts, loopback), tls)


def distrustful(server: Loopback) -> Fetcher:
    """A client as it is by default, but for the port, which is not to be the reason of its refusals."""
    return Fetcher(FetchSettings(ports=(80, 443, server.port)))


async def refusal(client: Fetcher, url: str, field: str = "image") -> str:
    with pytest.raises(InvalidRequest) as refused:
        await client.picture(url, field)
    assert refused.value.field == field
    return refused.value.message


@pytest.mark.parametrize("url", ARRIVE + DO_NOT_ARRIVE)
async def test_no_trick_reaches_the_loopback(server: Loopback, url: str):
    client, address = distrustful(server), url.format(port=server.port)
    await refusal(client, address)
    with pytest.raises((InvalidRequest, Unreachable)):
        await client.post(address, {}, b"{}", 5)
    assert server.connections == 0


@pytest.mark.parametrize("url", ARRIVE)
async def test_where_nobody_guards_the_tricks_work(server: Loopback, url: str):
    """What makes the test above one that can fail."""
    unguarded = Fetcher(FetchSettings(ports=(server.port,)), guard=httpcore2.AnyIOBackend())  # pyright: ignore
    assert await unguarded.picture(url.format(port=server.port)) == PNG
    assert server.connections == 1


def ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe, suppress(OSError):
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not ipv6(), reason="this machine has no IPv6 on its loopback")
@pytest.mark.parametrize("host", ["[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "ip6-loopback", "localhost"])
async def test_no_trick_reaches_the_loopback_in_ipv6(host: str):
    async with serving(always(body=PNG), host="::1") as server:
        address = f"http://{host}:{server.port}/"
        await refusal(distrustful(server), address)
        assert server.connections == 0
        if host.endswith(":1]"):  # what names mean is up to the machine, and of :: the peer says that it is ::1
            assert await Fetcher(FetchSettings(ports=(server.port,), allowed=("::1",))).picture(address) == PNG
            assert server.connections == 1


@pytest.mark.parametrize("allowed", ["127.0.0.0/8", "127.0.0.1", "localhost"])
async def test_what_the_operator_names_is_fetched(server: Loopback, allowed: str):
    client = Fetcher(FetchSettings(ports=(server.port,), allowed=(allowed,)))
    host = "localhost" if allowed == "localhost" else "127.0.0.1"
    assert await client.picture(server.url(host=host)) == PNG
    assert server.connections == 1


async def test_a_port_that_is_not_on_the_list_is_not_tried(server: Loopback):
    client = Fetcher(FetchSettings(allowed=LOOPBACK))
    assert "80, 443" in await refusal(client, server.url())
    assert server.connections == 0


async def test_proxies_of_the_environment_are_not_used(server: Loopback, monkeypatch: pytest.MonkeyPatch):
    async with serving(always(body=PNG)) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url())
        assert await fetcher(server).picture(server.url()) == PNG
        await refusal(distrustful(server), server.url())
    assert (proxy.connections, server.connections) == (0, 1)


async def test_the_request_is_plain_and_names_the_host(server: Loopback):
    await fetcher(server).picture(f"http://pictures.test:{server.port}/a%20b.png?size=1&x=%2F#part")
    [request] = server.requests
    assert (request.method, request.target) == ("GET", "/a%20b.png?size=1&x=%2F")
    assert request.headers["host"] == f"pictures.test:{server.port}"
    assert request.headers["accept-encoding"] == "identity"
    assert set(request.headers) == {"host", "accept", "accept-encoding", "user-agent"}


# Redirects


async def test_redirects_are_followed_three_times_and_no_further(server: Loopback):
    async def count_down(request: Request, writer: asyncio.StreamWriter) -> None:
        left = int(request.target.strip("/"))
        writer.write(response(302, location=f"/{left - 1}") if left else response(body=PNG))

    async with serving(count_down) as redirecting:
        client = fetcher(redirecting)
        assert await client.picture(redirecting.url("/3")) == PNG
        assert len(redirecting.requests) == 4
        await refusal(client, redirecting.url("/4"))
        assert len(redirecting.requests) == 8


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/",
        "//127.0.0.1:{port}/",
        "http://private.test:{port}/",
        "http://user@public.test:{port}/",
        "http://public.test:1/",
        "file:///etc/passwd",
        "gopher://public.test:{port}/",
        "http://[",
        "http://public.test:99999999/",
    ],
)
async def test_a_redirect_is_checked_like_the_first_address(server: Loopback, location: str):
    """`public.test` is allowed by name, and nothing else is."""
    async with serving(always(302, location=location.format(port=server.port))) as redirecting:
        client = fetcher(server, redirecting, allowed=["public.test"])
        await refusal(client, redirecting.url(host="public.test"))
        assert (len(redirecting.requests), server.connections) == (1, 0)


async def test_a_redirect_to_another_allowed_host_is_followed(server: Loopback):
    async with serving(always(307, location=f"http://other.test:{server.port}/x")) as redirecting:
        client = fetcher(server, redirecting, allowed=["public.test", "other.test"])
        assert await client.picture(redirecting.url(host="public.test")) == PNG


async def test_a_redirect_without_a_location_goes_in_circles_and_ends():
    async with serving(always(301)) as redirecting:
        await refusal(fetcher(redirecting), redirecting.url())
        assert len(redirecting.requests) == 4


# What comes back


@pytest.mark.parametrize("format", FORMATS)
async def test_a_picture_is_told_by_its_bytes(format):
    picture = encode(np.full((8, 8, 3), 9, np.uint8), format)
    async with serving(always(body=picture, content_type="text/html")) as server:
        assert await fetcher(server).picture(server.url()) == picture


NO_PICTURES: dict[str, Answer] = {
    "a page that says it is a picture": always(body=b"<html>secret</html>", content_type="image/png"),
    "svg": always(body=b"<svg xmlns='http://www.w3.org/2000/svg'/>", content_type="image/svg+xml"),
    "nothing": always(),
    "no content": always(204),
    "a picture with 404": always(404, PNG),
    "a picture with 500": always(500, PNG),
    "a part of a picture": always(206, PNG),
    "packed": always(body=b"\x1f\x8b\x08\x00" + bytes(50), content_encoding="gzip"),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
async def test_what_is_no_picture_is_refused_without_a_word_of_it(kind: str):
    async with serving(NO_PICTURES[kind]) as server:
        client = fetcher(server)
        closed = Fetcher(FetchSettings(ports=(80, 1), allowed=LOOPBACK))
        messages = {
            await refusal(client, server.url()),
            await refusal(closed, "http://127.0.0.1:1/"),  # nobody listens there
            await refusal(distrustful(server), server.url()),  # somebody does, but who asks shall not learn it
            await refusal(distrustful(server), "http://no-such-name.invalid/"),
        }
        assert len(messages) == 1
        assert "secret" not in messages.pop()


async def test_the_reason_is_in_the_log_without_the_addresses_secrets(
    server: Loopback, caplog: pytest.LogCaptureFixture
):
    await refusal(distrustful(server), server.url("/private/path?token=secret"))
    assert f"GET http://127.0.0.1:{server.port}: Refused: 127.0.0.1 is not public" in caplog.text
    assert "secret" not in caplog.text
    assert "path" not in caplog.text


# Limits on bytes and time


async def endless_body(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + PNG)
    while True:
        writer.write(bytes(65536))
        await writer.drain()


async def endless_headers(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x-more: " + b"x" * 1000 + b"\r\n")
        await writer.drain()


async def one_endless_header(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nx-more: ")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def endless_status_line(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 ")
    while True:
        writer.write(b"2" * 65536)
        await writer.drain()


async def endlessly_informing(_: Request, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
        await writer.drain()


async def dripping_head(_: Request, writer: asyncio.StreamWriter) -> None:
    for byte in response(body=PNG):
        writer.write(bytes([byte]))
        await asyncio.sleep(0.05)


async def dripping_body(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + PNG)
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.05)


async def hanging_up(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def half_a_body(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + PNG)


async def no_http(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail.test ESMTP\r\n")


MISCHIEF = (
    *(endless_body, endless_headers, one_endless_header, endless_status_line, endlessly_informing),
    *(dripping_head, dripping_body, never, hanging_up, half_a_body, no_http),
)


@pytest.mark.parametrize("mischief", MISCHIEF)
async def test_mischief_ends_with_the_deadline_at_the_latest(mischief: Answer):
    async with serving(mischief) as server:
        started = time.monotonic()
        await refusal(fetcher(server, timeout_s=0.8, max_bytes=100_000), server.url())
        assert time.monotonic() - started < 4
        assert server.connections == 1


@pytest.mark.parametrize("mischief", [endless_body, endless_headers, one_endless_header, endless_status_line])
async def test_what_is_endless_is_cut_off_by_its_size(mischief: Answer):
    """Long before the deadline."""
    async with serving(mischief) as server:
        started = time.monotonic()
        await refusal(fetcher(server, timeout_s=60, max_bytes=100_000), server.url())
        assert time.monotonic() - started < 20


GARBAGE = (
    b"",
    b"\r\n\r\n",
    bytes(range(256)),
    PNG,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"HTTP/2 200 OK\r\n\r\n" + PNG,
    b"HTTP/1.1 99 No\r\n\r\n" + PNG,
    b"HTTP/1.1 1000 No\r\n\r\n" + PNG,
    b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n" + PNG,
    b"HTTP/1.1 101 Switching\r\n\r\n" + PNG,
    b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n" + PNG,
    b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n" + PNG,
    b"HTTP/1.1 200 OK\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n" + PNG,
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n" + PNG,
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n" + PNG,
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"f" * 5000 + b"\r\n" + PNG,
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 20000,
    b"HTTP/1.1 200 OK\r\n: no name\r\n\r\n" + PNG,
    b"HTTP/1.1 200 OK\r\nx: \xff\x00\r\n\r\n" + PNG,
    b"HTTP/1.1 302 No\r\nlocation: \xff\xfe\r\n\r\n",
    b"HTTP/1.1 302 No\r\nlocation: http://[::1%25x]:99999999999999999999/\r\n\r\n",
    b"HTTP/1.1 302 No\r\nlocation: " + b"/" * 70000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nretry-after: \xff\r\n\r\n<html>",
)


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_is_refused_like_everything_else(garbage: bytes):
    """Whatever a server says, no other error than the client's own comes of it."""

    async def answer(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(garbage)

    async with serving(answer) as server:
        client = fetcher(server, timeout_s=2)
        await refusal(client, server.url())
        with suppress(Unreachable):
            assert isinstance(await client.post(server.url(), {}, b"{}", 2), Response)


async def test_a_picture_may_have_as_many_bytes_as_it_may_and_not_one_more():
    async with serving(always(body=PNG + bytes(5000 - len(PNG)))) as server:
        assert len(await fetcher(server, max_bytes=5000).picture(server.url())) == 5000
        assert "at most 4999 bytes" in await refusal(fetcher(server, max_bytes=4999), server.url())


# Several pictures


async def test_equal_addresses_of_a_request_are_fetched_once(server: Loopback):
    addresses = {"image": server.url("/a"), "mask": server.url("/b"), "controls.0.image": server.url("/a")}
    assert await fetcher(server).pictures(addresses) == dict.fromkeys(addresses, PNG)
    assert sorted(request.target for request in server.requests) == ["/a", "/b"]


async def test_pictures_are_fetched_at_once_but_no_more_than_may():
    here, most = 0, 0

    async def count(_: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal here, most
        here += 1
        most = max(most, here)
        await asyncio.sleep(0.1)
        here -= 1
        writer.write(response(body=PNG))

    async with serving(count) as server:
        addresses = {f"controls.{n}.image": server.url(f"/{n}") for n in range(8)}
        assert len(await fetcher(server, max_at_once=3).pictures(addresses)) == 8
    assert most == 3


async def test_one_that_fails_ends_the_others_and_is_named():
    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.target == "/missing":
            writer.write(response(404))
        else:
            await never(request, writer)

    async with serving(answer) as server:
        started = time.monotonic()
        with pytest.raises(InvalidRequest) as refused:
            await fetcher(server).pictures({"image": server.url("/slow"), "mask": server.url("/missing")})
        assert refused.value.field == "mask"
        assert time.monotonic() - started < 4


async def test_more_pictures_than_a_request_may_name_are_refused_before_any_is_fetched(server: Loopback):
    addresses = {f"controls.{n}.image": server.url(f"/{n}") for n in range(fetch.MAX_PICTURES + 1)}
    with pytest.raises(InvalidRequest, match="more than 8"):
        await fetcher(server).pictures(addresses)
    assert server.connections == 0


async def test_nobody_takes_more_than_their_share_of_the_turns():
    """Four callers with slow servers; who has no key shares with everybody."""
    async with serving(never) as server:
        client = fetcher(server, max_at_once=8)

        def ask(id: str) -> asyncio.Task[bytes]:
            current.set(replace(ANONYMOUS, id=id))
            return asyncio.create_task(client.picture(server.url()))

        asking = [ask("ada") for _ in range(5)]
        await until(lambda: server.connections == 2)
        await asyncio.sleep(0.2)
        assert server.connections == 2
        asking += [ask("bob") for _ in range(2)]
        await until(lambda: server.connections == 4)
        asking += [ask(ANONYMOUS.id) for _ in range(4)]
        await until(lambda: server.connections == 8)
        for task in asking:
            task.cancel()
        ends = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(end) for end in ends} == {asyncio.CancelledError}


async def test_the_pictures_of_a_request_have_a_limit_together():
    large = PNG + bytes(5000 - len(PNG))
    async with serving(always(body=large)) as server:
        addresses = {f"controls.{n}.image": server.url(f"/{n}") for n in range(3)}
        client = fetcher(server, max_bytes=5000)
        assert len(await client.pictures(dict([*addresses.items()][:2]))) == 2
        with pytest.raises(InvalidRequest, match="10000 with the request's others"):
            await client.pictures(addresses)


async def test_who_gets_no_turn_is_told_to_come_back():
    async with serving(never) as server:
        client = fetcher(server, max_at_once=1)
        first = asyncio.create_task(client.picture(server.url()))
        await until(lambda: server.connections)
        with pytest.raises(Overloaded):
            await client.picture(server.url())
        assert server.connections == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_who_leaves_closes_the_connection():
    left = asyncio.Event()

    async def watch(request: Request, writer: asyncio.StreamWriter) -> None:
        while not writer.transport.is_closing():
            writer.write(b"HTTP/1.1 103 Hint\r\n\r\n")
            await asyncio.sleep(0.02)
        left.set()

    async with serving(watch) as server:
        fetching = asyncio.create_task(fetcher(server).picture(server.url()))
        await until(lambda: server.requests)
        fetching.cancel()
        await asyncio.wait_for(left.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await fetching


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def secure(authority: trustme.CA) -> AsyncIterator[tuple[Loopback, list[str | None]]]:
    """A server with a certificate for right.test, and the names that clients said they want to speak to."""
    named: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("right.test").configure_cert(context)
    context.sni_callback = lambda _, name, __: named.append(name)
    async with serving(always(body=PNG), tls=context) as server:
        yield server, named


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_a_certificate_is_compared_with_the_name(
    secure: tuple[Loopback, list[str | None]], authority: trustme.CA
):
    server, named = secure
    client = fetcher(server, tls=trusting(authority))
    assert await client.picture(server.url(scheme="https", host="right.test")) == PNG
    assert (named, len(server.requests)) == (["right.test"], 1)
    await refusal(client, server.url(scheme="https", host="wrong.test"))
    await refusal(client, server.url(scheme="https", host="127.0.0.1"))
    with pytest.raises(Unreachable):
        await client.post(server.url(scheme="https", host="wrong.test"), {}, b"{}", 5)
    assert len(server.requests) == 1


async def test_a_certificate_of_nobody_knows_whom_is_refused(secure: tuple[Loopback, list[str | None]]):
    server, _ = secure
    await refusal(fetcher(server), server.url(scheme="https", host="right.test"))
    assert server.requests == []


# Posting


async def test_a_post_brings_its_headers_and_body_and_tells_the_status(server: Loopback):
    answer = await fetcher(server).post(server.url("/hook?a=1"), {"webhook-id": "msg_1"}, b'{"a": 1}', 5)
    assert answer == Response(200, None)
    [request] = server.requests
    assert (request.method, request.target, request.body) == ("POST", "/hook?a=1", b'{"a": 1}')
    assert request.headers["webhook-id"] == "msg_1"


async def test_a_post_is_not_redirected(server: Loopback):
    async with serving(always(307, location=server.url())) as redirecting:
        assert (await fetcher(server, redirecting).post(redirecting.url(), {}, b"{}", 5)).status == 307
    assert server.connections == 0


async def test_of_the_answer_to_a_post_little_is_read():
    sent = 0

    async def huge(_: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 500 No\r\ncontent-length: 1000000000\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            sent += 65536
            await writer.drain()

    async with serving(huge) as server:
        assert (await fetcher(server).post(server.url(), {}, b"{}", 5)).status == 500
    assert sent < 50_000_000  # what the system's buffers take


async def test_a_status_counts_though_its_body_never_ends():
    async with serving(dripping_body) as server:
        started = time.monotonic()
        assert (await fetcher(server).post(server.url(), {}, b"{}", 0.5)).status == 200
        assert time.monotonic() - started < 3


@pytest.mark.parametrize("mischief", [never, hanging_up, dripping_head, no_http, endless_headers])
async def test_a_post_that_is_not_answered_is_unreachable(mischief: Answer):
    async with serving(mischief) as server:
        started = time.monotonic()
        with pytest.raises(Unreachable):
            await fetcher(server).post(server.url(), {}, b"{}", 0.5)
        assert time.monotonic() - started < 3


async def test_a_header_with_a_newline_is_not_sent(server: Loopback):
    with pytest.raises(Unreachable):
        await fetcher(server).post(server.url(), {"x-a": "1\r\nx-b: 2"}, b"{}", 5)
    assert server.requests == []


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("120", 120.0), ("0", 0.0), (None, None), ("soon", None), ("-5", None), ("1.5", None), ("", None)],
)
def test_retry_after_in_seconds(value: str | None, seconds: float | None):
    assert retry_after_s(value) == seconds


def test_retry_after_as_a_date():
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 90))
    assert retry_after_s(soon) == pytest.approx(90, abs=3)
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
