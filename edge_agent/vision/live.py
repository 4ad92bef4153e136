"""Work on the items of a live source, which come whether there is room or not; results in the order of the items.

    reader thread: item -> under way, if fewer than `at_once` are          -> result
                        -> else it waits, if fewer than WAITING do         -> under way when one is read
                        -> else one is dropped, or it is degraded: worked on in the way that always has room

Knows nothing about photos or the cloud.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WAITING = 2  # items that wait for room: of a camera the newest frames are worth most

WhenFull = Literal["block", "drop_oldest", "drop_newest", "degrade"]
DROPPING: tuple[WhenFull, ...] = ("drop_oldest", "drop_newest")


@dataclass(frozen=True, slots=True)
class Dropped:
    """Items that were not worked on, since more came than there was room for: `count` of them from `index` on."""

    index: int
    count: int


@dataclass
class Entry(Generic[Item, Result]):
    """Items in order: one that waits (no future), one that is under way or done, or some that were dropped."""

    index: int
    item: Item | None
    future: Future[Result] | None = None
    dropped: int = 0

    @property
    def waits(self) -> bool:
        return self.future is None and not self.dropped


class LiveWork(Generic[Item, Result]):
    """One source. `work` gets an item, and whether it is to be degraded. Iterate it once; closing that ends it."""

    def __init__(
        self,
        threads: Executor,
        work: Callable[[Item, bool], Result],
        items: Iterable[Item],
        at_once: int,
        when_full: WhenFull,
        on_drop: Callable[[], None],
    ) -> None:
        """`on_drop` is called for each item that is dropped."""
        self._threads, self._work, self._items, self._at_once = threads, work, items, at_once
        self._when_full, self._on_drop = when_full, on_drop
        self._entries: deque[Entry[Item, Result]] = deque()  # not read yet; bounded, since adjacent drops are merged
        self._changed = threading.Condition()
        self._ended, self._errors = False, list[Exception]()

    def results(self) -> Iterator[Result | Dropped]:
        """Results and drops in order. The first error ends them, with a note that names the item by its index."""
        threading.Thread(target=self._read, name="isthmus-live", daemon=True).start()
        try:
            while (entry := self._next()) is not None:
                if entry.future is None:
                    yield Dropped(entry.index, entry.dropped)
                    continue
                try:
                    result = entry.future.result()
                except Exception as error:
                    error.add_note(f"at index {entry.index} of the photos")
                    raise
                yield result
            if self._errors:
                raise self._errors[0]
        finally:
            self._end()

    def _next(self) -> Entry[Item, Result] | None:
        """The first entry that is not read; what waits for room begins. None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._ended)
            if not self._entries:
                return None
            self._changed.wait_for(lambda: not self._entries[0].waits or self._ended)
            entry = self._entries.popleft()
            self._begin_waiting()
            self._changed.notify_all()
        return entry

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            for entry in self._entries:
                if entry.future is not None:
                    entry.future.cancel()
            self._changed.notify_all()

    def _read(self) -> None:
        """Take items from the source until it or the reading of results ends."""
        try:
            for index, item in enumerate(self._items):
                with self._changed:
                    if self._ended:
                        return
                    self._add(Entry(index, item))
                    self._changed.notify_all()
        except Exception as error:
            self._errors.append(error)
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not any(entry.waits for entry in self._entries))
            self._ended = True
            self._changed.notify_all()

    def _add(self, entry: Entry[Item, Result]) -> None:
        waiting = [other for other in self._entries if other.waits]
        if self._begun() < self._at_once and not waiting:
            self._begin(entry, degraded=False)
        elif self._when_full == "degrade":
            self._changed.wait_for(lambda: self._ended or self._begun() < 2 * self._at_once)
            self._begin(entry, degraded=True)
        elif len(waiting) >= WAITING:
            self._drop(waiting[0] if self._when_full == "drop_oldest" else entry)
        self._entries.append(entry)
        self._merge()

    def _begun(self) -> int:
        return sum(entry.future is not None for entry in self._entries)

    def _begin(self, entry: Entry[Item, Result], degraded: bool) -> None:
        if entry.item is not None and not self._ended:
            entry.future = self._threads.submit(self._work, entry.item, degraded)
            entry.item = None

    def _begin_waiting(self) -> None:
        for entry in self._entries:
            if entry.waits and self._begun() < self._at_once:
                self._begin(entry, degraded=False)

    def _drop(self, entry: Entry[Item, Result]) -> None:
        entry.item, entry.dropped = None, 1
        self._on_drop()

    def _merge(self) -> None:
        """Make one entry of drops that follow each other."""
        merged: deque[Entry[Item, Result]] = deque()
        for entry in self._entries:
            if entry.dropped and merged and merged[-1].dropped:
                merged[-1].dropped += entry.dropped
            else:
                merged.append(entry)
        self._entries = merged
