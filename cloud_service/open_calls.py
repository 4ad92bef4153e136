"""Calls that are open: how many there may be at once, and which of them are idle. Knows nothing about gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

from isthmus.cloud_service.access import Device
from isthmus.models.errors import Overloaded, Refused
from isthmus.protos.limits import IDLE_STREAM_S

T = TypeVar("T")
SHORT_IDLE_S = 0.1  # between two messages of a busy device


class OpenCall:
    """One call of a peer, answered by the task that makes this object."""

    def __init__(
        self,
        device: Device,
        busy: Callable[[], bool],
        finish: Callable[[], None],
        refuse: Callable[[Refused], None] = lambda error: None,
    ) -> None:
        """`busy`: whether something is computed for it. `finish`: ends it once all that waits is written.

        refuse: ends it with an error; nothing where it ends soon by itself.
        """
        self.device, self._refuse = device, refuse
        self.ended = False  # others may have its place
        self._busy, self._finish = busy, finish
        self._task = asyncio.current_task()
        self._blocked = False  # the peer does not read what is written
        self._active_s = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds without a message either way; 0 while something is computed, unless the peer does not read."""
        return time.monotonic() - self._active_s if self._blocked or not self._busy() else 0.0

    def end(self) -> None:
        """Finish the call, or give it up if the peer does not read; others may have its place.

        Of a call that was given up, gRPC keeps one message until the connection closes: it offers no way to reset it.
        """
        if self._blocked and self._task is not None:
            self._task.cancel()
        elif not self.ended:
            self._finish()
        self.ended = True

    @property
    def peer(self) -> str:
        return self.device.peer

    def refuse(self, error: Refused) -> None:
        """End the call with an error, or give it up if the peer does not read."""
        if self._blocked and self._task is not None:
            self._task.cancel()
        else:
            self._refuse(error)

    async def reading(self, messages: AsyncIterator[T]) -> AsyncIterator[T]:
        """The messages that the peer sends."""
        async for message in messages:
            self._active_s = time.monotonic()
            yield message

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around the writing of one message, which waits until the peer reads."""
        self._active_s, self._blocked = time.monotonic(), True
        try:
            yield
        finally:
            self._active_s, self._blocked = time.monotonic(), False


class OpenCalls:
    """At most `limit` calls. One more takes the place of a call of the peer that has the most.

    That call has been idle for IDLE_STREAM_S, or is idle now and of a peer with more calls than the new one's.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[OpenCall, None] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def open(self, call: OpenCall) -> Iterator[None]:
        """Count `call` as open. Raises Overloaded when there is no place, and no idle call that could leave its own."""
        if sum(not other.ended for other in self._open) >= self._limit:
            self._end_one(call.peer)
        self._open[call] = None
        try:
            yield
        finally:
            self._open.pop(call, None)

    def end_idle(self, idle_s: float) -> None:
        """End every call that has been idle for `idle_s`."""
        for call in self._open:
            if call.idle_s >= idle_s:
                call.end()

    def refuse(self, why: Callable[[Device], Refused | None]) -> None:
        """End the calls of devices that may not use the service any more."""
        for call in self._open:
            if (error := why(call.device)) is not None:
                call.refuse(error)

    def _end_one(self, new_peer: str) -> None:
        count = Counter(call.peer for call in self._open if not call.ended)
        fewest = count[new_peer] + 1  # of a peer that gives nothing up before IDLE_STREAM_S: a device ends its own then
        idle = [
            call
            for call in self._open
            if not call.ended and call.idle_s >= (IDLE_STREAM_S if count[call.peer] <= fewest else SHORT_IDLE_S)
        ]
        if not idle:
            raise Overloaded(f"{self._limit} calls are open, which is the limit, and none of them is idle")
        max(idle, key=lambda call: (count[call.peer], call.idle_s)).end()
