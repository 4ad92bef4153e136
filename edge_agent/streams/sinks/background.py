"""Delivery in a thread of its own, so that a slow or absent receiver holds up no frame."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")

log = logging.getLogger("isthmus.streams")

MOST_WAITING = 64  # items; the oldest is left out for a new one
CLOSE_S = 10.0  # to deliver what waits at the end


class Background(Generic[Item]):
    """`deliver` is called with one item at a time; what it raises is counted as undelivered."""

    def __init__(self, name: str, deliver: Callable[[Item], None], undelivered: Callable[[str], None]) -> None:
        self.name, self._deliver, self._undelivered = name, deliver, undelivered
        self._queue: queue.Queue[Item | None] = queue.Queue(MOST_WAITING)
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"isthmus-{name}", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Never waits."""
        while True:
            try:
                return self._queue.put_nowait(item)
            except queue.Full:
                self._leave_out()

    def close(self) -> None:
        """Deliver what waits, for CLOSE_S at most."""
        try:
            self._queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _leave_out(self) -> None:
        try:
            self._queue.get_nowait()
        except queue.Empty:
            return
        self._undelivered(self.name)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._deliver(item)
            except Exception as error:  # of a receiver: whatever it is, the next item is tried
                self._undelivered(self.name)
                if not self._failing:
                    log.warning("%s: an answer is not delivered: %s", self.name, error)
                self._failing = True
            else:
                self._failing = False
