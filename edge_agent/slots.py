"""Slots for work that may be done at the same time, granted in order of arrival."""

from __future__ import annotations

import os
import threading
from collections import deque


class FairSlots:
    """As a semaphore; but `threading.Semaphore` and `Lock` let a busy thread take them again and again."""

    def __init__(self, count: int) -> None:
        self._mutex = threading.Lock()
        self._count = count
        self._held = 0
        self._waiting: deque[threading.Event] = deque()

    @property
    def full(self) -> bool:
        """Whether the next one has to wait."""
        with self._mutex:
            return self._held >= self._count

    def acquire(self, timeout_s: float | None = None, urgent: bool = False) -> bool:
        """Take a slot, after waiting for one at most `timeout_s`; `urgent`: before those that wait already.

        Returns whether there was one.
        """
        with self._mutex:
            if self._held < self._count:  # then nobody waits
                self._held += 1
                return True
            turn = threading.Event()
            self._waiting.insert(0 if urgent else len(self._waiting), turn)
        try:
            granted = turn.wait(timeout_s)
        except BaseException:  # an interrupt: leave the queue, or pass on what was just granted
            if not self._leave(turn):
                self.release()
            raise
        return granted or not self._leave(turn)

    def release(self) -> None:
        """Leave a slot to the next one."""
        with self._mutex:
            self._held -= 1
            self._grant()

    def resize(self, count: int) -> None:
        """Change the number of slots. Those that are held stay so."""
        with self._mutex:
            self._count = count
            self._grant()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _grant(self) -> None:
        while self._waiting and self._held < self._count:
            self._held += 1
            self._waiting.popleft().set()

    def _leave(self, turn: threading.Event) -> bool:
        """Stop waiting. False if the slot was granted meanwhile."""
        with self._mutex:
            if turn.is_set():
                return False
            self._waiting.remove(turn)
            return True


def compute_slots(threads: int) -> int:
    """Photos that are computed at once: as many as fill the cores and one more, since decoding uses one core only."""
    cores = os.cpu_count() or 1
    return 1 + cores // (min(threads, cores) or cores)
