"""The replicas that hold one language model: which to use now, and which sessions they may still hold.

Sessions in the cloud are caches; the tokens, which count, are here.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from isthmus.edge_agent.transport.language_link import LanguageLink
from isthmus.models.errors import AnswerCancelled, LinkDown
from isthmus.models.language.drafts import shared_length
from isthmus.models.messages import SESSION_BYTES

MAX_IDLE_SESSIONS = 32  # remembered for the next turn of their chats
MIN_REUSED_TOKENS = 16  # a shorter common prefix is not worth a session of its own
POLL_S = 0.02


@dataclass
class SessionHandle:
    """A session in the cloud: its id and kind, at which replica, and how many of `tokens` that should hold."""

    session: bytes
    target: str = ""
    held: int = 0
    tokens: tuple[int, ...] = ()
    kind: bytes = b""


class Replicas:
    """Links in order of preference; one that fails goes to the end."""

    def __init__(self, links: Sequence[LanguageLink], fingerprint: bytes, wait_s: float) -> None:
        """`wait_s`: how long to wait for a replica when nothing else can answer."""
        self.fingerprint = fingerprint
        self._links = list(links)
        self._wait_s = wait_s
        self._idle: list[SessionHandle] = []
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._links)

    def __iter__(self) -> Iterator[LanguageLink]:
        return iter(self._links)

    def best(self, besides: Collection[LanguageLink] = ()) -> LanguageLink | None:
        """The first whose breaker is not open, and which is none of `besides`."""
        return next((link for link in self._links if link.state != "open" and link not in besides), None)

    def record_failure(self, link: LanguageLink, error: Exception) -> None:
        """Prefer the others from now on, and this one only after it answers a probe."""
        link.record_failure(str(error))
        with self._lock:
            self._links = [*(other for other in self._links if other is not link), link]

    def wait(self, cancelled: threading.Event) -> LanguageLink:
        """Wait for a replica. Raises LinkDown after `wait_s`, AnswerCancelled when `cancelled` is set."""
        until_s = time.monotonic() + self._wait_s
        while (link := self.best()) is None:
            if time.monotonic() > until_s:
                raise LinkDown(f"no cloud answered within {self._wait_s:.0f} s")
            if cancelled.wait(POLL_S):
                raise AnswerCancelled("the answer was given up")
        return link

    def acquire(self, prompt: Sequence[int], kind: bytes = b"") -> SessionHandle:
        """The idle session of this kind that shares most with `prompt`, for one answer alone, or a new one."""
        with self._lock:
            handles = [handle for handle in self._idle if handle.kind == kind]
            best = max(handles, key=lambda handle: shared_length(handle.tokens, prompt), default=None)
            held = shared_length(best.tokens, prompt[:-1]) if best is not None else 0
            if best is None or held < MIN_REUSED_TOKENS:
                return SessionHandle(secrets.token_bytes(SESSION_BYTES), kind=kind)
            self._idle.remove(best)
            best.held = held
            return best

    def release(self, handle: SessionHandle, tokens: Sequence[int]) -> None:
        """Remember a session after its answer, for the next turn."""
        if handle.held:
            handle.tokens = tuple(tokens[: handle.held])
            with self._lock:
                self._idle = [*self._idle[1 - MAX_IDLE_SESSIONS :], handle]

    def close(self) -> None:
        """Close every link."""
        for link in self._links:
            link.close()
