"""The address that a service registers, so that services on other hosts and in other containers reach it.

Owns the choice between the configured address and the detected one.
"""

import asyncio
import ipaddress
import socket
from typing import Protocol
from urllib.parse import urlsplit

from penstock.errors import ConfigError

AUTO = "auto"
QUEUE_PORT = 6379  # any port works: nothing is sent there


class Listening(Protocol):
    """The section of a service."""

    @property
    def host(self) -> str: ...

    @property
    def advertise_host(self) -> str: ...


async def advertised_host(name: str, section: Listening, queue_url: str) -> str:
    """The host to register. `name`: of the section, for errors.

    Without `advertise_host` it is `host`. If `host` means every address of this host, no other host can connect to it:
    then the result is that of `auto`.
    """
    if section.advertise_host == AUTO or (not section.advertise_host and _is_every_address(section.host)):
        return await _address_towards(queue_url, f"{name}.advertise_host")
    return section.advertise_host or section.host


def _is_every_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


async def _address_towards(queue_url: str, key: str) -> str:
    """The source address of this host's packets to the queue."""
    parts = urlsplit(queue_url)
    if not parts.hostname:  # a unix socket: everything is on this host
        return "127.0.0.1"
    problem: OSError | None = None
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            parts.hostname, parts.port or QUEUE_PORT, type=socket.SOCK_DGRAM
        )
    except OSError as error:
        found, problem = [], error
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)  # a datagram socket only chooses the route here, and sends nothing
            except OSError as error:
                problem = error
                continue
            return str(probe.getsockname()[0])
    raise ConfigError(
        f"{key}: the address of this host on its way to redis.url ({parts.hostname}) cannot be found "
        f"({problem}); expected a route there, or set {key} to a name or address that the other services reach"
    )
