"""The clouds that hold one language model: which to ask now, and which sessions they may still hold.

Sessions in the cloud are caches; what counts is the tokens, and those are here.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from isthmus.edge_agent.transport.link import Link
from isthmus.models.errors import LinkDown
from isthmus.models.language.drafts import shared_length
from isthmus.models.messages import SESSION_BYTES

KEPT_SEATS = 32  # sessions remembered for the next turn of their chats
WORTH_TOKENS = 16  # a shorter common beginning is not worth a session of its own
LOOK_S = 0.02


@dataclass
class SessionHandle:
    """A session in a cloud: its name and kind there, where, and how many of `tokens` it should hold."""

    session: bytes
    target: str = ""
    held: int = 0
    tokens: tuple[int, ...] = ()
    kind: bytes = b""


class Replicas:
    """Links in order of preference; one that fails goes to the end of the line."""

    def __init__(self, links: Sequence[Link], fingerprint: bytes, wait_s: float) -> None:
        """`wait_s`: how long to wait for a cloud when no other way is left."""
        self.fingerprint = fingerprint
        self._links = list(links)
        self._wait_s = wait_s
        self._seats: list[SessionHandle] = []
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    def best(self) -> Link | None:
        """The first that is not left alone at present."""
        return next((link for link in self._links if link.state != "open"), None)

    def lost(self, link: Link, error: Exception) -> None:
        """Others first from now on, and this one only when it answers a probe."""
        link.record_failure(str(error))
        with self._lock:
            self._links = [*(other for other in self._links if other is not link), link]

    def wait(self) -> Link:
        """Wait for a cloud. Raises LinkDown after `wait_s`."""
        until_s = time.monotonic() + self._wait_s
        while (link := self.best()) is None:
            if time.monotonic() > until_s:
                raise LinkDown(f"no cloud answered within {self._wait_s:.0f} s")
            time.sleep(LOOK_S)
        return link

    def seat(self, prompt: Sequence[int], kind: bytes = b"") -> SessionHandle:
        """The kept session of this kind that shares most with `prompt`, taken out for this answer, or a new one."""
        with self._lock:
            seats = [seat for seat in self._seats if seat.kind == kind]
            best = max(seats, key=lambda seat: shared_length(seat.tokens, prompt), default=None)
            held = shared_length(best.tokens, prompt[:-1]) if best is not None else 0
            if best is None or held < WORTH_TOKENS:
                return SessionHandle(secrets.token_bytes(SESSION_BYTES), kind=kind)
            self._seats.remove(best)
            best.held = held
            return best

    def keep(self, seat: SessionHandle, text: Sequence[int]) -> None:
        """Remember a session after its answer."""
        if seat.held:
            seat.tokens = tuple(text[: seat.held])
            with self._lock:
                self._seats = [*self._seats[1 - KEPT_SEATS :], seat]

    def close(self) -> None:
        for link in self._links:
            link.close()
