"""Places at an engine, shared fairly between peers: a free one goes to who has the fewest. Knows no engine."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

from isthmus.models.errors import Overloaded

RETRY_S = 1.0  # that a device is told to wait after a refusal


class Places:
    """At most `limit` at once; who would wait longer than `wait_s` is refused."""

    def __init__(self, limit: int, wait_s: float, busy: str = "") -> None:
        """`busy`: what is said to who is refused."""
        self._limit, self._wait_s = limit, wait_s
        self._busy = busy or f"the engine works on {limit} requests"
        self._taken: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def take(self, peer: str) -> None:
        """Return with a place, to be freed later. Raises Overloaded."""
        if self._taken.total() < self._limit:
            self._taken[peer] += 1
            return
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(peer, deque()).append(given)
        try:
            async with asyncio.timeout(self._wait_s):
                await given
        except BaseException as error:
            if given.done() and not given.cancelled():
                self.free(peer)
            else:
                self._forget(peer, given)
            if isinstance(error, TimeoutError):
                text = f"{self._busy}, and had no place within {self._wait_s:.0f} s"
                raise Overloaded(text, RETRY_S) from error
            raise

    def free(self, peer: str) -> None:
        """Give a place back."""
        self._taken[peer] -= 1
        if not self._taken[peer]:
            del self._taken[peer]
        if self._waiting:
            fewest = min(self._waiting, key=self._taken.__getitem__)  # of equal ones who came first
            self._taken[fewest] += 1
            given = self._waiting[fewest][0]
            self._forget(fewest, given)
            given.set_result(None)

    def _forget(self, peer: str, given: asyncio.Future[None]) -> None:
        self._waiting[peer].remove(given)
        if not self._waiting[peer]:
            del self._waiting[peer]
