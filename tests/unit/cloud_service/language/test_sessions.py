"""How a session is opened, reused and evicted, beside steps that run."""

from __future__ import annotations

import asyncio

import pytest

from isthmus.cloud_service.language import sessions
from isthmus.models.errors import ContextGone, InvalidInput, Overloaded
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.messages import Committed, Round
from isthmus.protos.limits import MAX_ROUNDS
from isthmus.protos.wire_session import checksum
from tests.unit.cloud_service.language.tiny import (
    CONTEXT,
    ENDS,
    Device,
    EngineHarness,
    Scenario,
    plain,
    until,
)


def test_a_device_that_comes_back_brings_only_what_is_new(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        expected = plain(decoder, list(range(10, 40)), 20)
        device = Device(harness, 1, expected[:30])
        await device.open()
        first = await device.ask(expected[30:33])
        assert first.held == 0
        device.leave()
        device.tokens = [*device.tokens, *expected[34:36]]
        harness.decoder.rows.clear()
        await device.open(start=34)
        second = await device.ask()
        assert second.held == 33
        assert sum(harness.decoder.rows) == 3
        assert (await device.ask()).held == 0
        assert device.tokens == expected[:38]

    scenario(play)


def test_a_device_may_continue_differently_from_an_earlier_token(scenario: Scenario, decoder: Decoder) -> None:
    """Its own tokens differ from the cloud's: the shared beginning is reused, the tokens are the device's."""

    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, list(range(10, 40)))
        await device.open()
        await device.ask(extend=0)
        device.leave()
        device.tokens = [*range(10, 30), 200, 201]
        await device.open()
        assert (await device.ask()).held == 20
        assert device.tokens == plain(decoder, [*range(10, 30), 200, 201], 1)

    scenario(play)


def test_the_reply_to_a_stale_first_round_reports_what_was_held(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, list(range(10, 40)))
        await device.open()
        await device.ask()
        device.leave()
        await device.open(start=30)
        assert device.session is not None
        harness.engine.add(device.session, Round(100, (1,)))
        assert await device.receive() == Committed(31, held=30)

    scenario(play)


def test_a_context_that_is_not_held_is_gone(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, list(range(10, 40)))
        with pytest.raises(ContextGone, match="the first 30 tokens of this session are not held"):
            await device.open(start=30)
        await device.open()
        await device.ask()
        device.leave()
        with pytest.raises(ContextGone):
            await device.open(start=31, crc32=1)
        device.tokens += [1] * 5
        for crc32 in (None, checksum(device.tokens[:31])):
            with pytest.raises(ContextGone):
                await device.open(start=36, crc32=crc32)
        device.tokens = device.tokens[:31]
        await device.open(start=31)
        assert (await device.ask()).held == 30

    scenario(play)


def test_a_context_of_a_device_that_left_is_gone_when_others_need_its_memory(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        first, second = Device(harness, 1, [3] * 10), Device(harness, 2, [4] * 10)
        await first.open()
        await first.ask()
        first.leave()
        await second.open()
        await second.ask()
        with pytest.raises(ContextGone):
            await first.open(start=10)
        await first.open()
        assert (await first.ask()).held == 0

    scenario(play, pages=1)


def test_an_idle_context_is_forgotten(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "IDLE_S", 0.0)

    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, [3] * 10)
        await device.open()
        await device.ask()
        assert harness.count("contexts_held") == 1
        device.leave()
        await until(lambda: harness.count("context_evictions_total", reason="idle") == 1)
        assert (harness.count("contexts_held"), harness.count("contexts_bytes")) == (0, 0)
        with pytest.raises(ContextGone):
            await device.open(start=10)

    scenario(play)


def test_a_session_opened_by_a_second_stream_ends_for_the_first(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        first = Device(harness, 1, list(range(10, 30)))
        await first.open()
        await first.ask()
        second = Device(harness, 1, first.tokens)
        await second.open(start=21)
        with pytest.raises(ContextGone, match="opened again elsewhere"):
            await first.receive()
        for _ in range(MAX_ROUNDS + 1):
            first.send([1, 2])
        first.leave()
        assert (await second.ask()).held == 20
        assert second.tokens == plain(decoder, list(range(10, 30)), 2)
        assert first.events.empty()

    scenario(play)


def test_cache_reuse_waits_for_the_step_that_the_session_is_part_of(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        first, other = Device(harness, 1, list(range(10, 30))), Device(harness, 2, [7, 8, 9])
        await first.open()
        await other.open()
        harness.decoder.gate.clear()
        first.send(extend=50)
        other.send(extend=50)
        await until(lambda: harness.decoder.inside)
        second = Device(harness, 1, list(range(10, 30)))
        opening = asyncio.create_task(second.open())
        await asyncio.sleep(0.02)
        assert not opening.done()
        harness.decoder.gate.set()
        await opening
        await second.ask(extend=3)
        for _ in range(3):
            await second.receive()
        for _ in range(51):
            await other.receive()
        assert second.tokens == plain(decoder, list(range(10, 30)), 4)
        assert other.tokens == plain(decoder, [7, 8, 9], 51)

    scenario(play)


def test_ids_outside_of_the_vocabulary_are_refused(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        with pytest.raises(InvalidInput, match="token 259 is outside of the model's vocabulary of 259"):
            await Device(harness, 1, [5, 259]).open()
        device = Device(harness, 1, [5, 258])
        await device.open()
        with pytest.raises(InvalidInput, match="token 300 is outside"):
            device.send([258, 300])
        assert (await device.ask([258])).base == 2

    scenario(play)


def test_a_prompt_as_long_as_the_context_is_refused_and_one_shorter_is_finished(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        with pytest.raises(InvalidInput, match=f"{CONTEXT} tokens leave no room in the model's context of {CONTEXT}"):
            await Device(harness, 1, [5] * CONTEXT).open()
        device = Device(harness, 1, [5] * (CONTEXT - 2))
        await device.open()
        assert (await device.ask([258] * 9, extend=9)).base == CONTEXT - 2
        while len(device.tokens) < CONTEXT and device.tokens[-1] not in ENDS:
            await device.receive()
        assert await device.ask() == Committed(len(device.tokens))

    scenario(play)


def test_a_sequence_that_outgrows_the_memory_is_an_error_and_affects_no_other(
    scenario: Scenario, decoder: Decoder
) -> None:
    async def play(harness: EngineHarness) -> None:
        with pytest.raises(Overloaded, match="the state of 70 tokens does not fit"):
            await Device(harness, 9, [5] * 70).open()
        small, large = Device(harness, 1, [7, 8, 9]), Device(harness, 2, list(range(10, 70)))
        await small.open()
        await large.open()
        await large.ask(extend=100)
        with pytest.raises(Overloaded, match="the state of 65 tokens does not fit"):
            while True:
                await large.receive()
        assert len(large.tokens) == 65
        with pytest.raises(Overloaded):
            await large.ask()
        await small.ask(extend=10)
        for _ in range(10):
            await small.receive()
        assert small.tokens == plain(decoder, [7, 8, 9], 11)

    scenario(play, pages=1)


def test_drafts_that_do_not_fit_are_an_error_and_later_rounds_are_answered(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, [5] * 60)
        await device.open()
        device.send([1] * 10)
        device.send()
        with pytest.raises(Overloaded):
            await device.receive()
        assert (await device.receive()).base == 60

    scenario(play, pages=1)


def test_a_session_whose_device_disconnects_in_a_failing_step_is_evicted(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "IDLE_S", 0.0)

    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, [7, 8, 9])
        await device.open()
        harness.decoder.failure = RuntimeError("a kernel broke")
        harness.decoder.gate.clear()
        device.send()
        await until(lambda: harness.decoder.inside)
        device.leave()
        harness.decoder.gate.set()
        await until(lambda: not list(harness.engine._sessions))

    scenario(play)


def test_none_follows_at_once_when_the_session_was_opened_again(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        before, after = Device(harness, 1, [7, 8, 9]), Device(harness, 2, [7, 8, 9])
        for first in (before, after):
            await first.open()
            assert first.session is not None
            harness.decoder.gate.clear()
            first.send(extend=100)
            await until(lambda: harness.decoder.inside)
            if first is before:
                harness.engine.end(first.session)
            opening = asyncio.create_task(Device(harness, int.from_bytes(first.name), [7, 8, 9]).open())
            harness.decoder.gate.set()
            await opening
            if first is after:
                harness.engine.end(first.session)
            events = []
            while (answer := await first.events.get()) is not None:
                events.append(answer)
            assert isinstance(events[-1], ContextGone)
            assert not any(isinstance(answer, ContextGone) for answer in events[:-1])

    scenario(play)


def test_sessions_are_bounded_and_one_without_a_device_makes_room(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)

    async def play(harness: EngineHarness) -> None:
        first, second, third = (Device(harness, number, [7, 8, number]) for number in range(3))
        await first.open()
        await second.open()
        with pytest.raises(Overloaded, match="2 sessions are open"):
            await third.open()
        first.leave()
        await third.open()
        await third.ask()
        with pytest.raises(ContextGone):
            await first.open(start=3)

    scenario(play)


def test_memory_that_a_step_allocates_for_a_device_that_disconnects_is_counted(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, [7, 8, 9])
        await device.open()
        harness.decoder.gate.clear()
        device.send()
        await until(lambda: harness.decoder.inside)
        device.leave()
        harness.decoder.gate.set()
        await until(lambda: harness.count("contexts_bytes") == harness.most_bytes > 0)

    scenario(play)


def test_a_peer_s_sessions_are_kept_within_its_own_limit_and_others_are_left_alone(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        first, second = (Device(harness, number, [7, 8, number], peer="a") for number in range(2))
        other = Device(harness, 2, [7, 8, 2], peer="b")
        for device in (first, second, other):
            await device.open()
            await device.ask()
        page = harness.decoder.new_cache().bytes_for(1)
        assert await harness.engine.keep_within("a", 2 * page)
        assert not await harness.engine.keep_within("a", page)  # a device is connected to each
        first.leave()
        other.leave()
        assert await harness.engine.keep_within("a", page)
        with pytest.raises(ContextGone):
            await first.open(start=3)
        await second.ask()
        await other.open(start=3)

    scenario(play)
