"""Requests that share calls: how many at a time, in whose name, and what becomes of them when a call fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from isthmus.cloud_service.vision.groups import MAX_GROUP, Groups


class Calls:
    """Calls that end when they are let go, each request answered by its tenfold."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []
        self._ends: list[asyncio.Future[None]] = []

    async def __call__(self, requests: Sequence[int]) -> Sequence[int]:
        self.made.append(list(requests))
        self._ends.append(asyncio.get_running_loop().create_future())
        await self._ends[-1]
        return [10 * request for request in requests]

    def end(self, number: int, error: Exception | None = None) -> None:
        if error is None:
            self._ends[number].set_result(None)
        else:
            self._ends[number].set_exception(error)


def play(scene: Callable[[Calls, Groups[int, int]], Awaitable[None]], enough: int = 2) -> None:
    async def run() -> None:
        calls = Calls()
        await scene(calls, Groups(calls, lambda: enough))

    asyncio.run(asyncio.wait_for(run(), 10))


def ask(groups: Groups[int, int], *requests: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(groups.ask(request)) for request in requests]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_few_requests_have_a_call_each_and_those_that_come_later_share_the_next() -> None:
    async def scene(calls: Calls, groups: Groups[int, int]) -> None:
        tasks = ask(groups, 1, 2, 3, 4)
        await settle()
        assert calls.made == [[1], [2]]
        calls.end(1)
        await settle()
        assert calls.made == [[1], [2], [3, 4]]
        calls.end(0)
        calls.end(2)
        assert await asyncio.gather(*tasks) == [10, 20, 30, 40]

    play(scene)


def test_a_call_has_no_more_than_a_group() -> None:
    async def scene(calls: Calls, groups: Groups[int, int]) -> None:
        ask(groups, *range(MAX_GROUP + 3))
        await settle()
        calls.end(0)
        await settle()
        assert list(map(len, calls.made)) == [1, MAX_GROUP]

    play(scene, enough=1)


def test_who_gives_up_before_the_call_is_not_in_it() -> None:
    async def scene(calls: Calls, groups: Groups[int, int]) -> None:
        _, second, third = ask(groups, 1, 2, 3)
        await settle()
        second.cancel()
        await settle()
        calls.end(0)
        await settle()
        assert calls.made == [[1], [3]]
        calls.end(1)
        assert await third == 30

    play(scene, enough=1)


def test_who_gives_up_during_the_call_harms_nobody() -> None:
    async def scene(calls: Calls, groups: Groups[int, int]) -> None:
        first, second, third = ask(groups, 1, 2, 3)
        await settle()
        calls.end(0)
        assert await first == 10
        await settle()
        second.cancel()
        await settle()
        calls.end(1)
        assert await third == 30

    play(scene, enough=1)


def test_an_error_is_everyones_in_the_call_and_nobody_elses() -> None:
    async def scene(calls: Calls, groups: Groups[int, int]) -> None:
        first, second, third = ask(groups, 1, 2, 3)
        await settle()
        calls.end(0)
        await settle()
        fourth = asyncio.create_task(groups.ask(4))
        await settle()
        calls.end(1, ValueError("lost"))
        await settle()
        calls.end(2)
        assert (await first, await fourth) == (10, 40)
        for task in (second, third):
            with pytest.raises(ValueError, match="lost"):
                await task

    play(scene, enough=1)
