"""Network addresses as people write them, HOST:PORT: one parser for both sides.

Opens no socket and resolves no name.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator

from isthmus.models.errors import InvalidInput

MAX_PORT = 65_535
MAX_SHOWN = 60  # characters of a wrong address
NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})")


@dataclass(frozen=True, slots=True)
class Address:
    """`host` is a name, an IPv4 address, or an IPv6 address without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """HOST:PORT or [IPV6]:PORT -> Address; port 0 is for listening. Raises InvalidInput, which says what is wrong."""
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidInput(f"{text[:MAX_SHOWN]!a} is {error}") from error


def parse(text: str) -> Address:
    """`parse_address` for validators. Raises ValueError without the address."""
    text = text.strip()
    scheme, separator, _ = text.partition("://")
    if separator:
        raise wrong(f"leave out {shown(scheme + separator)}")
    if "/" in text:
        raise wrong(f"leave out the path {shown(text[text.index('/') :])}")
    host, separator, port = text.rpartition(":")
    if is_ipv6(text) or is_ipv6(text[1:-1]) or is_ipv6(host):
        raise wrong("an IPv6 address is written in brackets, with a port: [::1]:50051")
    if not separator:
        raise wrong("the port is missing")
    return Address(parse_host(host), parse_port(port))


def parse_host(host: str) -> str:
    if host.startswith("[") and host.endswith("]") and is_ipv6(host[1:-1]):
        return host[1:-1]
    if not host:
        raise wrong("the host is missing")
    if not NAME.fullmatch(host):
        raise wrong(f"{shown(host)} is neither a name nor an IP address")
    return host


def parse_port(port: str) -> int:
    if not port:
        raise wrong("the port is missing")
    if not (port.isascii() and port.isdecimal()):
        raise wrong(f"the port {shown(port)} is no number")
    if len(port) > len(str(MAX_PORT)) or int(port) > MAX_PORT:
        raise wrong(f"the port is above {MAX_PORT}")
    return int(port)


def is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return "]" not in text  # which a scope may contain


def is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Whether only this machine reaches a name or address."""
    return name == "localhost" or (is_ip_address(name) and ipaddress.ip_address(name).is_loopback)


def shown(text: str) -> str:
    return ascii(text[:MAX_SHOWN])


def wrong(reason: str) -> ValueError:
    return ValueError(f"not HOST:PORT: {reason}")


def listening(text: str) -> str:
    return str(parse(text))


def reachable(text: str) -> str:
    address = parse(text)
    if address.port == 0:
        raise wrong("nobody can be reached at port 0")
    return str(address)


# Fields of settings: the address without spaces around it.
ListenAddress = Annotated[str, AfterValidator(listening)]
PeerAddress = Annotated[str, AfterValidator(reachable)]


def shown_url(url: str) -> str:
    """An address without user, password and query, which may be secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
