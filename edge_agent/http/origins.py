"""Who may use the local API from a browser: pages that the agent's own address serves, and those of allowed origins.

    Host                    an IP address, localhost, the address listened on, or an allowed name: another name may have
                            been pointed at this device by a page of that name (DNS rebinding)
    Sec-Fetch-Site, Origin  of requests that do something: those of the same origin, or of an allowed one. Other
                            programs send neither.

Knows nothing about how a response is sent.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers

from isthmus.models.address import is_ip_address, is_loopback, parse_address

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing, and a page of another origin cannot read the answer
MAX_SHOWN = 60


class OriginPolicy:
    """The policy of an agent that listens on `listen`.

    With no `allowed` names any will do beyond loopback, for programs that are no browsers.
    """

    def __init__(self, listen: str, allowed: Iterable[str], origins: Iterable[str] = ()) -> None:
        host = parse_address(listen).host
        names = {name.lower().rstrip(".") for name in allowed}
        self._any = not names and not is_loopback(host)
        self._names = names | {host.lower(), "localhost"}
        self._origins = frozenset(origins)

    def refusal(self, method: str, headers: Headers) -> str | None:
        """Why a request is refused, or None."""
        any_name = self._any and not from_browser(headers)
        for host in headers.getlist("host"):
            if not (any_name or self._is_ours(host)):
                return f"Host {ascii(host)[:MAX_SHOWN]} is not a name of this agent; --allowed-host adds one"
        if method in SAFE_METHODS or is_same_origin(headers) or headers.get("origin") in self._origins:
            return None
        return "a page of another origin may not use this agent; --allowed-origin allows one"

    def _is_ours(self, host: str) -> bool:
        name = host_name(host)
        return name in self._names or name.endswith(".localhost") or is_ip_address(name)


def from_browser(headers: Headers) -> bool:
    """Whether a page sends the request; simple requests to read, which may lack both headers, are not recognised."""
    return "origin" in headers or "sec-fetch-site" in headers


def is_same_origin(headers: Headers) -> bool:
    """Whether a request is no browser's, or of a page of the origin that it goes to."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site in ("same-origin", "none")
    return origin is None or origin.partition("://")[2] == headers.get("host")


def host_name(host: str) -> str:
    """The name or address of HOST, HOST:PORT or [IPV6]:PORT, without brackets, in small letters."""
    name, separator, port = host.strip().lower().rpartition(":")
    if not separator or not (port.isdecimal() or not port):
        name = host.strip().lower()
    return name.removeprefix("[").removesuffix("]").rstrip(".")
