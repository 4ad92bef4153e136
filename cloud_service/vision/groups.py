"""Requests to replicas in groups: a call to another process costs more than what it carries.

few in flight  -> each request is a call of its own, at once
many in flight -> those that come while enough calls run share the next one
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

MAX_GROUP = 16  # requests of one call

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Groups(Generic[Request, Answer]):
    """Makes calls for requests, several of which may share one."""

    def __init__(
        self, call: Callable[[Sequence[Request]], Awaitable[Sequence[Answer]]], enough: Callable[[], int]
    ) -> None:
        """`call` answers requests in their order; what it raises, each of them gets. `enough`: calls at a time."""
        self._call, self._enough = call, enough
        self._waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._running: set[asyncio.Task[None]] = set()

    async def ask(self, request: Request) -> Answer:
        """The answer to one request; one that is cancelled later is answered in vain. Raises as `call`."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._start()
        return await future

    def _start(self) -> None:
        self._waiting = [waiting for waiting in self._waiting if not waiting[1].done()]
        while self._waiting and len(self._running) < self._enough():
            group, self._waiting = self._waiting[:MAX_GROUP], self._waiting[MAX_GROUP:]
            task = asyncio.create_task(self._run(group))
            self._running.add(task)

    async def _run(self, group: Sequence[tuple[Request, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._call([request for request, _ in group])
            for (_, future), answer in zip(group, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except Exception as error:
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
        finally:
            self._running.discard(asyncio.current_task())
            self._start()
