"""The guard of outgoing connections: a network backend for httpcore2 that dials public addresses and no others.

A name is resolved once, every address it has must be public, exactly one of these is dialled, and the peer is looked at
again. So what was checked is what is spoken to, whatever the name means a moment later (DNS rebinding). TLS is not
touched: the certificate is compared with the name, not with the address.
"""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, cast

import httpcore2

from models.errors import Overloaded

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str], Awaitable[Sequence[str]]]  # the addresses of a name; raises OSError or ValueError

LOOKUPS = 64  # at once; one that hangs keeps its thread until the system gives up, also where nobody waits any more
BUSY_S = 5.0  # after which a lookup may be asked for again
DIALS = 3  # of a name's addresses: the first may be of a network that is not connected

_GLOBAL_UNICAST = ip_network("2000::/3")  # all there is of the public internet in IPv6
_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "192.0.0.0/24",  # IETF protocol assignments, and Oracle's metadata at 192.0.0.192
        "192.88.99.0/24",  # 6to4 relays (RFC 7526)
        "168.63.129.16/32",  # Azure's platform, which answers machines that run on it
        "2001::/23",  # IETF protocol assignments: Teredo (RFC 4380), ORCHID, benchmarking
        "2001:db8::/32",  # documentation (RFC 3849)
        "2002::/16",  # 6to4 (RFC 3056): an IPv4 address in disguise
        "3fff::/20",  # documentation (RFC 9637)
    )
)
_ISATAP = (0x00005EFE, 0x02005EFE)  # what an interface identifier begins with that hides an IPv4 address (RFC 5214)


class Refused(httpcore2.ConnectError):
    """The guard does not dial this."""


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet's, by IANA's special-purpose registries (RFC 6890).

    The forms of IPv6 that carry an IPv4 address (mapped, NAT64, 6to4, Teredo, ISATAP) are not, whatever they carry.
    """
    if any(address in network for network in _NOT_PUBLIC):
        return False
    if isinstance(address, IPv6Address):
        return address in _GLOBAL_UNICAST and (int(address) >> 32) & 0xFFFFFFFF not in _ISATAP
    return address.is_global and not address.is_multicast


class Resolver:
    """The system's name resolution, in threads of its own: a lookup that hangs takes no thread from other work."""

    def __init__(self, addresses: Callable[[str], list[str]] | None = None, at_once: int = LOOKUPS):
        self._addresses = addresses or addresses_of
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="lookup")
        self._free = threading.Semaphore(at_once)

    async def __call__(self, name: str) -> Sequence[str]:
        """The addresses of a name. Raises Overloaded where no thread is free: nobody waits behind those that hang."""
        if not self._free.acquire(blocking=False):
            raise Overloaded(BUSY_S, "too many names are being looked up")
        lookup = self._threads.submit(self._addresses, name)
        lookup.add_done_callback(lambda _: self._free.release())
        return await asyncio.wrap_future(lookup)


def addresses_of(name: str) -> list[str]:
    """What the system says. Blocks."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(where[0]) for *_, where in found))


class Guard(httpcore2.AsyncNetworkBackend):
    """Dials what is public, and what the operator allows: `networks`, and `hosts`, whose addresses are trusted.

    Its errors are those of httpcore2, Refused, ConnectError, ConnectTimeout, and Overloaded.
    """

    def __init__(
        self,
        networks: Collection[Network] = (),
        hosts: Collection[str] = (),
        resolve: Resolve | None = None,
        dial: httpcore2.AsyncNetworkBackend | None = None,
    ):
        self._networks, self._hosts = tuple(networks), frozenset(hosts)
        self._resolve = resolve or Resolver()
        # Without anyio there would be another class in its place: what a type checker cannot rule out.
        self._dial = dial or cast(httpcore2.AsyncNetworkBackend, httpcore2.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A connection to one of the host's addresses, within `timeout` seconds for lookup and dialling together."""
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._checked(host)
                share = None if timeout is None else timeout / len(addresses)
                return await self._first(addresses, port, share)
        except TimeoutError as slow:
            raise httpcore2.ConnectTimeout(f"no connection within {timeout} s") from slow

    async def _checked(self, host: str) -> list[Address]:
        """The first few of the host's addresses, where all of them may be reached."""
        try:
            addresses = [ip_address(answer) for answer in await self._resolve(host)]
        except (OSError, ValueError) as unknown:
            raise httpcore2.ConnectError(f"the name has no address: {unknown}") from unknown
        if not addresses:
            raise httpcore2.ConnectError("the name has no address")
        if host.removesuffix(".").lower() not in self._hosts:
            for address in addresses:
                if not (is_public(address) or any(address in network for network in self._networks)):
                    raise Refused(f"{address} is not public, and not allowed by the configuration")
        return addresses[:DIALS]

    async def _first(
        self, addresses: Sequence[Address], port: int, timeout: float | None
    ) -> httpcore2.AsyncNetworkStream:
        """A connection to the first address that takes one."""
        *others, last = addresses
        for address in others:
            try:
                return await self._connected(address, port, timeout)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self._connected(last, port, timeout)

    async def _connected(self, address: Address, port: int, timeout: float | None) -> httpcore2.AsyncNetworkStream:
        stream = await self._dial.connect_tcp(str(address), port, timeout)
        try:
            peer = ip_address(stream.get_extra_info("server_addr")[0])
            if peer != address:
                raise Refused(f"dialled {address}, but {peer} took the connection")
        except BaseException:
            await stream.aclose()
            raise
        return stream
