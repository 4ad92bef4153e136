"""A heavy neighbour, a queue that is too long, devices that do not read or that leave, and what sessions take."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from isthmus.cloud_service.language import sessions
from isthmus.cloud_service.language.engines import native
from isthmus.cloud_service.language.session import MAX_UNREAD, SESSION_BYTES, TOKEN_BYTES
from isthmus.models.errors import InvalidInput, Overloaded
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.messages import Opening, Round
from tests.unit.cloud_service.language.tiny import CONTEXT, WIDTH, Device, EngineHarness, Scenario, StateDevice, until

LONG = [5] * 200  # tokens of a prompt: 25 steps


async def opened(harness: EngineHarness, numbers: range, prompt: list[int], peer: str) -> list[Device]:
    devices = [Device(harness, number, prompt, peer=peer) for number in numbers]
    for device in devices:
        await device.open()
    return devices


async def settled(harness: EngineHarness) -> int:
    """Steps so far, when no more follow."""
    steps = -1
    while steps != len(harness.decoder.rows):
        steps = len(harness.decoder.rows)
        await asyncio.sleep(0.05)
    return steps


def slow_steps(harness: EngineHarness, seconds: float) -> None:
    """As if each step so far had taken that long."""
    for _ in range(32):
        harness.engine._step_time.observe(seconds)


@pytest.mark.parametrize("pages", [200, 8])
def test_a_neighbour_with_many_prompts_does_not_delay_another_peer(scenario: Scenario, pages: int) -> None:
    """With memory for all of them, and for two at a time."""

    async def play(harness: EngineHarness) -> None:
        many = await opened(harness, range(16), LONG, "many")
        for device in many:
            device.send()
        await until(lambda: len(harness.decoder.rows) >= 8)
        (one,) = await opened(harness, range(99, 100), [7] * 40, "one")
        before = len(harness.decoder.rows)
        await one.ask()
        assert len(harness.decoder.rows) - before <= 2 * 40 // WIDTH + 3
        for _ in range(5):
            before = len(harness.decoder.rows)
            await one.ask()
            assert len(harness.decoder.rows) - before <= 3
        for device in many:
            await device.receive()

    scenario(play, pages=pages)


def test_a_prompt_that_would_wait_too_long_is_refused_at_once_with_a_time_to_try_again(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        harness.decoder.gate.clear()
        slow_steps(harness, 1.0)
        many = await opened(harness, range(4), LONG, "many")
        (one,) = await opened(harness, range(9, 10), [7] * 16, "one")
        for device in [*many, one]:
            device.send()
        await until(lambda: harness.count("prompts_refused_total") == 2)
        with pytest.raises(Overloaded, match=r"would wait 50\.\d s for other prompts, the limit is 30\.0 s") as error:
            await many[2].receive()
        assert 20 <= error.value.retry_s <= 21
        assert many[0].events.empty()
        harness.decoder.gate.set()
        for device in (many[0], many[1], one):
            await device.receive()
        await many[2].ask()  # its session is still open

    scenario(play)


def test_a_single_prompt_is_never_refused_and_a_session_that_goes_on_neither(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        slow_steps(harness, 100.0)
        first, second = await opened(harness, range(2), LONG, "peer")
        await first.ask()
        harness.decoder.gate.clear()
        slow_steps(harness, 100.0)
        second.send()
        await until(lambda: harness.decoder.inside)
        first.send([5] * 8)
        harness.decoder.gate.set()
        await first.receive()
        await second.receive()

    scenario(play)


def test_a_prompt_that_waits_for_memory_is_refused_when_it_has_waited_too_long(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(harness: EngineHarness) -> None:
        running, waiting = await opened(harness, range(2), [5] * 60, "peer")
        await running.ask(extend=3)
        harness.decoder.gate.clear()
        waiting.send()
        await until(lambda: harness.decoder.inside)
        monkeypatch.setattr(harness.engine, "_first_token_s", 0.0)
        harness.decoder.gate.set()
        with pytest.raises(Overloaded, match="the limit is 0"):
            await waiting.receive()
        for _ in range(3):
            await running.receive()

    scenario(play, pages=1)


def test_the_prompt_of_a_device_that_leaves_ends_at_the_next_step(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        (device,) = await opened(harness, range(1), LONG, "peer")
        harness.decoder.gate.clear()
        device.send()
        await until(lambda: harness.decoder.inside)
        device.leave()
        harness.decoder.gate.set()
        assert await settled(harness) == 1

    scenario(play)


def test_the_sequence_of_a_device_that_does_not_read_pauses_and_goes_on_when_it_does(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        (device,) = await opened(harness, range(1), [5, 6, 7], "peer")
        device.send(extend=150)
        assert await settled(harness) == device.events.qsize() == MAX_UNREAD
        held_bytes = harness.queue.held_bytes
        for _ in range(150):
            await device.receive()
        assert len(device.tokens) == 153
        assert await settled(harness) > MAX_UNREAD
        assert harness.queue.held_bytes < held_bytes

    scenario(play)


def test_what_opened_sessions_take_is_counted_and_given_back(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        devices = await opened(harness, range(8), LONG, "peer")
        assert harness.queue.held_bytes == 8 * (SESSION_BYTES + TOKEN_BYTES * len(LONG))
        assert harness.count("contexts_held") == 8
        for device in devices[:4]:
            await device.ask()
        assert harness.queue.held_bytes == 8 * SESSION_BYTES + TOKEN_BYTES * (8 * len(LONG) + 4)
        for device in devices:
            device.leave()
        for session in list(harness.engine._sessions):
            harness.engine._sessions._evict(session.name, "idle")
        assert (harness.queue.held_bytes, harness.count("contexts_held")) == (0, 0)
        assert not harness.engine._sessions.served

    scenario(play)


def test_a_session_that_is_opened_again_is_counted_once(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        before, after = Device(harness, 1, LONG, peer="a"), Device(harness, 1, LONG, peer="b")
        await before.open()
        before.send()
        await after.open()
        before.leave()
        assert harness.queue.held_bytes == SESSION_BYTES + TOKEN_BYTES * len(LONG)
        await after.ask()

    scenario(play)


def test_hidden_states_that_wait_are_counted(scenario: Scenario, decoder: Decoder, handoff: HandoffBundle) -> None:
    async def play(harness: EngineHarness) -> None:
        device = StateDevice(harness, decoder, handoff, 1, [5, 6, 7])
        await device.open()
        before = harness.queue.held_bytes
        device.send(0)
        round_ = device.round(0)
        assert harness.queue.held_bytes >= before + sum(map(len, round_.states))
        await device.receive()
        assert harness.queue.held_bytes == before + 3 * TOKEN_BYTES

    scenario(play)


def test_when_what_waits_is_full_sessions_without_a_device_go_and_then_openings_are_refused(
    scenario: Scenario,
) -> None:
    async def play(harness: EngineHarness) -> None:
        harness.queue.limit_bytes = 2 * SESSION_BYTES + 2000
        first, second = await opened(harness, range(2), [5, 6, 7], "peer")
        (third,) = (Device(harness, 2, [5, 6, 7]),)
        with pytest.raises(Overloaded, match="that may wait in this service are taken"):
            await third.open()
        first.leave()
        await third.open()
        with pytest.raises(Overloaded):
            third.engine.add(third.session, Round(3, tuple([5] * 60)))  # type: ignore[arg-type]
        await second.ask()

    scenario(play)


def test_the_sessions_of_a_connection_are_bounded(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_PEER_SESSIONS", 2)

    async def play(harness: EngineHarness) -> None:
        first, _ = await opened(harness, range(2), [5, 6, 7], "one")
        with pytest.raises(Overloaded, match="2 sessions of this connection are open"):
            await opened(harness, range(2, 3), [5, 6, 7], "one")
        other, another = await opened(harness, range(3, 5), [5, 6, 7], "other")
        first.leave()
        await opened(harness, range(2, 3), [5, 6, 7], "one")
        await other.ask()
        await another.ask()

    scenario(play)


def test_an_opening_that_waits_for_a_step_is_counted(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        (running,) = await opened(harness, range(1), [5, 6, 7], "peer")
        harness.decoder.gate.clear()
        running.send()
        await until(lambda: harness.decoder.inside)
        before = harness.queue.held_bytes
        opening = asyncio.create_task(Device(harness, 1, LONG).open())
        await until(lambda: harness.queue.held_bytes > before)
        assert harness.queue.held_bytes == before + TOKEN_BYTES * len(LONG)
        opening.cancel()
        await asyncio.wait([opening])
        assert harness.queue.held_bytes == before
        harness.decoder.gate.set()

    scenario(play)


class Unread(tuple[int, ...]):
    """Tokens of which there are too many to be looked at."""

    def __len__(self) -> int:
        return CONTEXT

    def __iter__(self) -> Any:
        raise AssertionError("the tokens are read before their number is checked")


def test_the_number_of_tokens_is_checked_before_they_are_read(scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        opening = Opening(harness.engine.info.fingerprint[:8], bytes(16), 0, Unread(), 0)
        with pytest.raises(InvalidInput, match="leave no room in the model's context"):
            await harness.engine.open(opening, Device(harness, 1, []).events)

    scenario(play)


def test_a_long_opening_is_checked_off_the_event_loop(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LARGE_OPENING", 100)
    threads: list[threading.Thread] = []

    async def play(harness: EngineHarness) -> None:
        check = harness.engine._sessions.check
        monkeypatch.setattr(
            harness.engine._sessions, "check", lambda *args: threads.append(threading.current_thread()) or check(*args)
        )
        await opened(harness, range(1), LONG, "peer")
        await opened(harness, range(1, 2), [5], "peer")

    scenario(play)
    assert [each is threading.main_thread() for each in threads] == [False, True]
