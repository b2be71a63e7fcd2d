"""Which names clients may call the server by: the `Host` header, against DNS rebinding.

A page that a browser has loaded from a foreign name can let that name point at this server
and then read its answers; the header still says the foreign name. Knows names and addresses.
Does not know requests.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

__all__ = ["AllowedHosts", "host_pattern"]

_HEADER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/?#\s]+)(?::[0-9]{1,5})?")
_NAME = re.compile(r"[^\[\]:@/?#*\s]+")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class AllowedHosts:
    """The names by which one server may be called.

    Args:
        listens_on: The address that it listens on.
        allowed: The operator's list. None: what it listens on. Of a loopback address: localhost,
            127.0.0.1, ::1 and the address itself. Else: any address, since a browser asks
            nobody where an address lies, and the name that is listened on; where that is all
            addresses (0.0.0.0, ::), localhost and the name of the machine.

    Attributes:
        names: In lower case; "*.name" for those below it, "*" for any.
        takes_addresses: Whether every address in digits is a good name.
    """

    def __init__(self, listens_on: str, allowed: Sequence[str] | None) -> None:
        self.takes_addresses = False
        if allowed is not None:
            self.names = tuple(map(host_pattern, allowed))
            return
        own = listens_on.lower().strip("[]")
        address = _address(own)
        if own == "localhost" or (address is not None and address.is_loopback):
            self.names = tuple(dict.fromkeys((*_LOOPBACK, own)))
            return
        self.takes_addresses = True
        is_everything = address is not None and address.is_unspecified
        self.names = ("localhost", socket.gethostname().lower()) if is_everything else (own,)

    def __str__(self) -> str:
        """Say it on one line."""
        return ", ".join([*self.names, *(["any address"] if self.takes_addresses else [])])

    def admits(self, header: bytes | None) -> bool:
        """Say whether a request with this `Host` is meant for this server; None: it has none."""
        found = None if header is None else _HEADER.fullmatch(header.decode("latin-1"))
        if found is None:
            return "*" in self.names and header is not None
        name = found.group(1).lower().strip("[]").removesuffix(".")
        if self.takes_addresses and _address(name) is not None:
            return True
        return any(_matches(name, pattern) for pattern in self.names)


def host_pattern(text: str) -> str:
    """Return an entry of `allowed_hosts` as it is compared.

    Raises:
        ValueError: It is no name, address or pattern; a port or scheme stands in it.
    """
    name = text.lower().removeprefix("[").removesuffix("]").removesuffix(".")
    if name == "*" or _address(name) is not None or _NAME.fullmatch(name.removeprefix("*.")):
        return name
    raise ValueError(
        f"{text!r} is no host; give a name or address without scheme and port, '*.name', or '*'"
    )


def _matches(name: str, pattern: str) -> bool:
    if pattern == "*" or name == pattern:
        return True
    return pattern.startswith("*.") and name.endswith(pattern[1:]) and name != pattern[1:]


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(name)
    except ValueError:
        return None
