"""Answers of one stream until they have left. Knows nothing about gRPC.

place -> request read -> answer computed -> waits here -> written: the place is free again
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from isthmus.cloud_service.byte_budget import ByteBudget

T = TypeVar("T")


class Outbox(Generic[T]):
    """A stream has `places` for requests and their answers, and the bytes of answers count in the budget."""

    def __init__(self, places: int, budget: ByteBudget) -> None:
        self._places = asyncio.Semaphore(places)
        self._waiting: asyncio.Queue[tuple[T | None, int | None]] = asyncio.Queue()  # with its bytes, if in a place
        self._budget = budget
        self._held_bytes = 0
        self._closed = False

    async def place(self) -> None:
        """Wait for a place for one more request."""
        await self._places.acquire()

    def put(self, answer: T, size_bytes: int) -> None:
        """The answer to a request, which keeps its place. Raises Overloaded where it does not fit into the budget."""
        if not self._closed:
            self._budget.take(size_bytes)
            self._held_bytes += size_bytes
            self._waiting.put_nowait((answer, size_bytes))

    def notify(self, notice: T | None) -> None:
        """A message that answers no request. After None nothing follows."""
        self._waiting.put_nowait((notice, None))

    async def messages(self) -> AsyncIterator[T]:
        """What is to be written, in order. A message counts as written when the next one is asked for."""
        while True:
            message, size_bytes = await self._waiting.get()
            if message is None:
                return
            yield message
            if size_bytes is not None:
                self._give(size_bytes)
                self._places.release()

    def close(self) -> None:
        """The stream has ended: nothing waits any more."""
        self._closed = True
        self._give(self._held_bytes)

    def _give(self, size_bytes: int) -> None:
        self._budget.give(size_bytes)
        self._held_bytes -= size_bytes
