"""Sessions by the name that their device chose, and what each takes beside its cache within a budget of bytes."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language.session import round_bytes
from isthmus.models.messages import Round


class HeldSession(Protocol):
    """A session as far as the table counts it. `counted_bytes`: of `own_bytes`, as counted last."""

    counted_bytes: int
    rounds: deque[tuple[Round, float]]

    @property
    def name(self) -> bytes: ...

    @property
    def own_bytes(self) -> int: ...


S = TypeVar("S", bound=HeldSession)


class SessionTable(Generic[S]):
    """What the hosts of sessions have in common."""

    def __init__(self, queue: ByteBudget) -> None:
        """`queue`: for what sessions take beside their caches."""
        self._queue = queue
        self._by_name: dict[bytes, S] = {}
        self._of_peer: Counter[str] = Counter()

    def __iter__(self) -> Iterator[S]:
        return iter(self._by_name.values())

    def __contains__(self, session: S) -> bool:
        """False also for a session that was opened again by another stream."""
        return self._by_name.get(session.name) is session

    def queue_round(self, session: S, round_: Round) -> None:
        """Raises Overloaded when there is no room for what waits."""
        size_bytes = round_bytes(round_)
        self._queue.take(size_bytes)
        session.counted_bytes += size_bytes
        session.rounds.append((round_, time.monotonic()))

    def settle(self, session: S, *, grow: bool = False) -> None:
        """Count what a session takes beside its cache. With `grow` it may have become more: raises Overloaded."""
        size_bytes = session.own_bytes if session in self else 0
        if size_bytes > session.counted_bytes and not grow:
            return
        if size_bytes > session.counted_bytes:
            self._queue.take(size_bytes - session.counted_bytes)
        else:
            self._queue.give(session.counted_bytes - size_bytes)
        session.counted_bytes = size_bytes
