from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from isthmus.cloud_service import open_calls as module
from isthmus.cloud_service.access import Device
from isthmus.cloud_service.open_calls import OpenCall, OpenCalls
from isthmus.models.errors import Overloaded
from isthmus.protos.limits import IDLE_STREAM_S


class Clock:
    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


class Caller:
    """A call that takes note of its end."""

    def __init__(self, peer: str = "a", busy: bool = False) -> None:
        self.busy, self.ended = busy, 0
        self.call = OpenCall(Device(peer), lambda: self.busy, self._finish)

    def _finish(self) -> None:
        self.ended += 1


def test_a_call_is_idle_since_its_last_message_either_way_and_not_while_something_is_computed(clock: Clock) -> None:
    async def messages() -> AsyncIterator[int]:
        clock.now_s = 5.0
        yield 1

    async def play() -> None:
        caller = Caller()
        clock.now_s = 2.0
        assert caller.call.idle_s == 2.0
        assert [message async for message in caller.call.reading(messages())] == [1]
        assert caller.call.idle_s == 0.0
        clock.now_s = 8.0
        with caller.call.writing():
            clock.now_s = 9.0
        assert caller.call.idle_s == 0.0
        clock.now_s, caller.busy = 20.0, True
        assert caller.call.idle_s == 0.0
        with caller.call.writing():
            clock.now_s = 23.0
            assert caller.call.idle_s == 3.0  # whatever is computed, the peer does not read it

    asyncio.run(play())


def test_idle_calls_are_ended_once(clock: Clock) -> None:
    async def play() -> None:
        calls, idle, busy = OpenCalls(9), Caller(), Caller(busy=True)
        with calls.open(idle.call), calls.open(busy.call):
            clock.now_s = 3.0
            calls.end_idle(4.0)
            assert idle.ended == 0
            clock.now_s = 4.0
            calls.end_idle(4.0)
            calls.end_idle(4.0)
            assert (idle.ended, busy.ended, len(calls)) == (1, 0, 2)
        assert len(calls) == 0

    asyncio.run(play())


def test_the_call_of_a_peer_that_does_not_read_is_aborted(clock: Clock) -> None:
    async def stuck(calls: OpenCalls) -> None:
        caller = Caller(busy=True)
        with calls.open(caller.call), caller.call.writing():
            await asyncio.Event().wait()

    async def play() -> None:
        calls = OpenCalls(9)
        task = asyncio.create_task(stuck(calls))
        await asyncio.sleep(0)
        clock.now_s = 4.0
        calls.end_idle(4.0)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(play())


def test_one_call_too_many_takes_the_place_of_the_longest_idle_one_of_the_peer_with_the_most(clock: Clock) -> None:
    async def play() -> None:
        calls, few = OpenCalls(4), Caller("few")
        many = [Caller("many", busy=index == 0) for index in range(3)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(calls.open(few.call))
            for caller in many:
                clock.now_s += 1.0
                caller.call = OpenCall(Device("many"), lambda caller=caller: caller.busy, caller._finish)  # type: ignore[misc]
                stack.enter_context(calls.open(caller.call))
            clock.now_s += IDLE_STREAM_S
            stack.enter_context(calls.open(Caller("new").call))
            assert [caller.ended for caller in (few, *many)] == [0, 0, 1, 0]
            stack.enter_context(calls.open(Caller("new").call))
            assert [caller.ended for caller in (few, *many)] == [0, 0, 1, 1]

    asyncio.run(play())


def test_a_peer_with_many_lively_streams_gives_one_up_to_a_peer_with_fewer(clock: Clock) -> None:
    async def play() -> None:
        calls = OpenCalls(4)
        many = [Caller("many", busy=index == 0) for index in range(3)]
        few = [Caller("few") for _ in range(3)]
        with contextlib.ExitStack() as stack:
            for caller in (*many, few[0]):
                stack.enter_context(calls.open(caller.call))
            clock.now_s += 1.0
            stack.enter_context(calls.open(few[1].call))
            assert [caller.ended for caller in (*many, *few)] == [0, 1, 0, 0, 0, 0]
            with pytest.raises(Overloaded):  # both have as many
                stack.enter_context(calls.open(few[2].call))

    asyncio.run(play())


def test_with_no_idle_call_the_next_is_refused_and_leaves_nothing(clock: Clock) -> None:
    async def play() -> None:
        calls, busy, recent = OpenCalls(2), Caller(busy=True), Caller()
        with calls.open(busy.call), calls.open(recent.call):
            with pytest.raises(Overloaded, match="2 calls are open, which is the limit"), calls.open(Caller().call):
                pass
            assert len(calls) == 2

    asyncio.run(play())
