from __future__ import annotations

import asyncio

import pytest

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.outbox import Outbox
from isthmus.models.errors import Overloaded


def test_a_place_is_free_and_the_bytes_are_given_back_when_the_answer_has_left() -> None:
    async def play() -> None:
        budget = ByteBudget(10)
        outbox: Outbox[str] = Outbox(1, budget)
        await outbox.place()
        outbox.put("answer", 7)
        messages = outbox.messages()
        assert await anext(messages) == "answer"
        waiting = asyncio.create_task(outbox.place())
        await asyncio.sleep(0)
        assert (budget.held_bytes, waiting.done()) == (7, False)  # being written
        outbox.notify(None)
        assert [message async for message in messages] == []
        await waiting
        assert budget.held_bytes == 0

    asyncio.run(play())


def test_a_notice_takes_no_place() -> None:
    async def play() -> None:
        outbox: Outbox[str] = Outbox(1, ByteBudget(10))
        await outbox.place()
        outbox.notify("notice")
        outbox.put("answer", 1)
        outbox.notify(None)
        assert [message async for message in outbox.messages()] == ["notice", "answer"]
        await outbox.place()

    asyncio.run(play())


def test_an_answer_that_does_not_fit_is_refused() -> None:
    async def play() -> None:
        budget = ByteBudget(10)
        outbox: Outbox[str] = Outbox(2, budget)
        outbox.put("first", 7)
        with pytest.raises(Overloaded):
            outbox.put("second", 7)
        assert budget.held_bytes == 7

    asyncio.run(play())


def test_a_closed_one_holds_nothing_and_takes_nothing() -> None:
    async def play() -> None:
        budget = ByteBudget(10)
        outbox: Outbox[str] = Outbox(3, budget)
        outbox.put("written", 2)
        outbox.put("waiting", 3)
        await anext(outbox.messages())
        outbox.close()
        outbox.put("late", 4)
        assert budget.held_bytes == 0

    asyncio.run(play())
