"""What the guard dials, and what it does not."""

import asyncio
import threading
import time
from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import httpcore2
import pytest

from app.guard import Guard, Refused, Resolver, is_public
from models.errors import Overloaded
from tests.app.loopback import always, serving

PUBLIC, OTHER_PUBLIC = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"

NOT_PUBLIC = {
    "loopback": ("127.0.0.1", "127.255.255.254", "::1"),
    "unspecified": ("0.0.0.0", "0.1.2.3", "::"),
    "private": ("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "fc00::1", "fd12:3456::1"),
    "link-local": ("169.254.0.1", "fe80::1", "fec0::1"),
    "shared by carriers": ("100.64.0.1", "100.127.255.255"),
    "metadata": ("169.254.169.254", "169.254.170.2", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
    "metadata in IPv6": ("fd00:ec2::254", "fd20:ce::254"),
    "multicast": ("224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"),
    "reserved": ("240.0.0.1", "255.255.255.255", "192.0.0.8", "198.18.0.1", "192.88.99.1"),
    "documentation": ("192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"),
    "IPv4-mapped": ("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:93.184.215.14"),
    "IPv4-compatible": ("::127.0.0.1", "::5db8:d70e"),
    "IPv4-translated": ("::ffff:0:127.0.0.1",),
    "NAT64": ("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1"),
    "6to4": ("2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:5db8:d70e::1"),
    "Teredo": ("2001:0:4136:e378:8000:63bf:80ff:fffe", "2001::1"),
    "ISATAP": ("2606:2800::5efe:7f00:1", "2606:2800::200:5efe:a9fe:a9fe"),
    "benchmarking and ORCHID": ("2001:2::1", "2001:10::1", "2001:20::1"),
    "discard, SRv6": ("100::1", "5f00::1"),
}
PUBLIC_ONES = (PUBLIC, OTHER_PUBLIC, "8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2001:4860:4860::8888")


class Dialled(httpcore2.AsyncNetworkBackend):
    """Notes what is dialled; nothing is there, or always the same server."""

    def __init__(self, server_port: int | None = None):
        self.addresses: list[str] = []
        self._server_port = server_port

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.addresses.append(host)
        if self._server_port is None:
            raise httpcore2.ConnectError("nobody there")
        return await httpcore2.AnyIOBackend().connect_tcp("127.0.0.1", self._server_port)


def answering(*answers: Sequence[str]):
    """A resolver that gives one answer after the other."""
    left = list(answers)

    async def resolve(_: str) -> Sequence[str]:
        return left.pop(0)

    return resolve


@pytest.mark.parametrize("kind", NOT_PUBLIC)
def test_it_is_not_public(kind: str):
    assert [address for address in NOT_PUBLIC[kind] if is_public(ip_address(address))] == []


@pytest.mark.parametrize("address", PUBLIC_ONES)
def test_it_is_public(address: str):
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", [address for kind in NOT_PUBLIC.values() for address in kind])
async def test_what_is_not_public_is_not_dialled(address: str):
    dial = Dialled()
    with pytest.raises(Refused):
        await Guard(dial=dial, resolve=answering([address])).connect_tcp("name.test", 80, 1)
    assert dial.addresses == []


async def test_one_private_address_among_public_ones_is_enough_to_refuse():
    dial = Dialled()
    with pytest.raises(Refused):
        await Guard(dial=dial, resolve=answering([PUBLIC, "10.0.0.1"])).connect_tcp("name.test", 80, 1)
    assert dial.addresses == []


async def test_a_name_that_rebinds_is_resolved_once_and_what_was_checked_is_dialled():
    dial, resolve = Dialled(), answering([PUBLIC], ["127.0.0.1"])
    guard = Guard(dial=dial, resolve=resolve)
    with pytest.raises(httpcore2.ConnectError, match="nobody there"):
        await guard.connect_tcp("rebinds.test", 80, 1)
    assert dial.addresses == [PUBLIC]
    with pytest.raises(Refused):  # the next connection asks anew, and is told the loopback
        await guard.connect_tcp("rebinds.test", 80, 1)
    assert dial.addresses == [PUBLIC]


async def test_a_peer_that_is_not_the_one_that_was_dialled_is_refused():
    async with serving(always()) as server:
        dial = Dialled(server.port)
        with pytest.raises(Refused, match=r"dialled 93\.184\.215\.14, but 127\.0\.0\.1"):
            await Guard(dial=dial, resolve=answering([PUBLIC])).connect_tcp("name.test", 80, 1)
        assert dial.addresses == [PUBLIC]
    assert server.requests == []


async def test_every_address_gets_its_try_up_to_three():
    dial = Dialled()
    found = [OTHER_PUBLIC, PUBLIC, "8.8.8.8", "1.1.1.1"]
    with pytest.raises(httpcore2.ConnectError):
        await Guard(dial=dial, resolve=answering(found)).connect_tcp("name.test", 80, 1)
    assert dial.addresses == found[:3]


async def test_what_the_operator_allows_is_dialled():
    async with serving(always()) as server:
        by_network = Guard([ip_network("127.0.0.0/8")], resolve=answering(["127.0.0.1"]))
        by_name = Guard(hosts=["minio.test"], resolve=answering(["127.0.0.1"], ["127.0.0.1"], ["127.0.0.1"]))
        for guard, name in ((by_network, "any.test"), (by_name, "minio.test"), (by_name, "MinIO.test.")):
            await (await guard.connect_tcp(name, server.port, 1)).aclose()
        with pytest.raises(Refused):
            await by_name.connect_tcp("other.test", server.port, 1)
    assert server.connections == 3


async def test_what_the_operator_allows_in_ipv4_is_not_allowed_in_disguise():
    guard = Guard([ip_network("127.0.0.0/8")], dial=(dial := Dialled()), resolve=answering(["::ffff:127.0.0.1"]))
    with pytest.raises(Refused):
        await guard.connect_tcp("name.test", 80, 1)
    assert dial.addresses == []


async def test_a_lookup_that_hangs_ends_with_the_deadline():
    async def hangs(_: str) -> Sequence[str]:
        await asyncio.sleep(600)
        return []

    started = time.monotonic()
    with pytest.raises(httpcore2.ConnectTimeout):
        await Guard(resolve=hangs).connect_tcp("slow.test", 80, 0.2)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("name", ["no-such-name.invalid", "a" * 64 + ".test", "a..b", "[", "%6c", ""])
async def test_a_name_without_an_address_is_a_connect_error(name: str):
    dial = Dialled()
    with pytest.raises(httpcore2.ConnectError):
        await Guard(dial=dial).connect_tcp(name, 80, 10)
    assert dial.addresses == []


async def test_a_name_that_resolves_to_nothing_is_a_connect_error():
    with pytest.raises(httpcore2.ConnectError, match="no address"):
        await Guard(resolve=answering([])).connect_tcp("empty.test", 80, 1)


async def test_lookups_that_hang_keep_their_threads_and_others_are_told_to_come_back():
    """Also where nobody waits for them any more."""
    end = threading.Event()

    def hangs(_: str) -> list[str]:
        end.wait()
        return ["127.0.0.1"]

    resolve = Resolver(hangs, at_once=2)
    guard = Guard(resolve=resolve)
    for _ in range(2):
        with pytest.raises(httpcore2.ConnectTimeout):
            await guard.connect_tcp("slow.test", 80, 0.05)
    with pytest.raises(Overloaded):
        await guard.connect_tcp("other.test", 80, 5)
    end.set()
    while True:
        try:
            assert await resolve("other.test") == ["127.0.0.1"]
            break
        except Overloaded:
            await asyncio.sleep(0.01)
