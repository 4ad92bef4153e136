"""One stream's messages against a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from isthmus.cloud_service.language.handler import GenerateHandler
from isthmus.models.errors import ContextGone, InvalidInput, Overloaded, UnknownBundle
from isthmus.models.messages import Opening, Round

MODEL = b"modelid8"


class ScriptedEngine:
    """Notes its calls; a session is the number of the opening. Fails to open while `failure` is set."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failure: Exception | None = None
        self._opened = 0

    async def open(self, opening: Opening, events: asyncio.Queue[Any], peer: str) -> int:
        if self.failure is not None:
            raise self.failure
        self._opened += 1
        return self._opened

    def add(self, session: int, round_: Round) -> None:
        self.calls.append(("add", session, round_.base))

    def end(self, session: int) -> None:
        self.calls.append(("end", session))

    def leave(self, session: int) -> None:
        self.calls.append(("leave", session))


def opening(model: bytes = MODEL) -> Opening:
    return Opening(model, bytes(16), 0, (5, 6), 0)


def finding(*engines: ScriptedEngine) -> Callable[[bytes], Any]:
    """What finds the engine of MODEL, if there is one."""

    def find(model: bytes) -> ScriptedEngine:
        if model != MODEL or not engines:
            raise UnknownBundle(f"model {model.hex()} is not held here")
        return engines[0]

    return find


async def open_session(handler: GenerateHandler, request: Opening) -> None:
    handler.begin_opening()
    await handler.handle(request)


def run(play: Callable[[GenerateHandler, ScriptedEngine], Coroutine[Any, Any, None]]) -> list[tuple[Any, ...]]:
    """The engine's calls in a play of one stream."""

    async def both() -> list[tuple[Any, ...]]:
        engine = ScriptedEngine()
        await play(GenerateHandler(finding(engine), "peer"), engine)
        return engine.calls

    return asyncio.run(both())


def test_rounds_go_to_the_session_that_was_opened() -> None:
    async def play(handler: GenerateHandler, engine: ScriptedEngine) -> None:
        await open_session(handler, opening())
        await handler.handle(Round(2))
        await handler.handle(Round(3))
        handler.end()
        assert handler.events.empty()

    assert run(play) == [("add", 1, 2), ("add", 1, 3), ("end", 1)]


def test_a_round_before_any_opening_is_invalid() -> None:
    async def play(handler: GenerateHandler, engine: ScriptedEngine) -> None:
        with pytest.raises(InvalidInput, match="before its session was opened"):
            await handler.handle(Round(2))

    assert run(play) == []


def test_an_unknown_model_is_the_error_of_whoever_looked_for_it() -> None:
    async def play(handler: GenerateHandler, engine: ScriptedEngine) -> None:
        with pytest.raises(UnknownBundle, match=f"{b'another8'.hex()} is not held here"):
            await open_session(handler, opening(b"another8"))
        await handler.handle(Round(2))  # is dropped

    run(play)


def test_rounds_after_a_failed_opening_are_dropped() -> None:
    async def play(handler: GenerateHandler, engine: ScriptedEngine) -> None:
        engine.failure = ContextGone("not held")
        with pytest.raises(ContextGone):
            await open_session(handler, opening())
        await handler.handle(Round(2))
        engine.failure = None
        await open_session(handler, opening())
        await handler.handle(Round(3))

    assert run(play) == [("add", 1, 3)]


def test_rounds_after_an_opening_that_could_not_be_read_are_dropped() -> None:
    async def play(handler: GenerateHandler, engine: ScriptedEngine) -> None:
        handler.begin_opening()
        await handler.handle(Round(2))

    assert run(play) == []


def test_a_second_opening_leaves_the_first_session() -> None:
    async def play(handler: GenerateHandler, engine: ScriptedEngine) -> None:
        await open_session(handler, opening())
        await open_session(handler, opening())
        await handler.handle(Round(2))

    assert run(play) == [("leave", 1), ("add", 2, 2)]


def test_leaving_twice_is_leaving_once() -> None:
    async def play(handler: GenerateHandler, engine: ScriptedEngine) -> None:
        await open_session(handler, opening())
        handler.leave()
        handler.leave()

    assert run(play) == [("leave", 1)]


def test_a_stream_without_a_session_ends_at_once() -> None:
    async def play(handler: GenerateHandler, engine: ScriptedEngine) -> None:
        handler.end()
        assert handler.events.get_nowait() is None

    assert run(play) == []


def test_beyond_its_device_s_quota_of_memory_a_session_is_left_and_refused() -> None:
    class Full(ScriptedEngine):
        within = True

        async def keep_within(self, peer: str, limit_bytes: int) -> bool:
            self.calls.append(("keep_within", peer, limit_bytes))
            return self.within

    async def play() -> list[tuple[Any, ...]]:
        engine = Full()
        handler = GenerateHandler(finding(engine), "peer", 1000)
        await open_session(handler, opening())
        await handler.handle(Round(2))
        engine.within = False
        with pytest.raises(Overloaded, match="more than the 1000 bytes of its quota") as caught:
            await handler.handle(Round(3))
        assert caught.value.retry_s > 0
        await handler.handle(Round(4))  # dropped: the refusal answers it
        return engine.calls

    asked = ("keep_within", "peer", 1000)
    assert asyncio.run(play()) == [asked, asked, ("add", 1, 2), asked, ("leave", 1), asked]
