"""Sessions share steps and memory: none loses a token by it, and none waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from isthmus.cloud_service.language import scheduler, session
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.messages import GREEDY, Sampling
from tests.unit.cloud_service.language.tiny import (
    ENDS,
    SAMPLED,
    WIDTH,
    Device,
    EngineHarness,
    Scenario,
    plain,
    prompts,
    until,
)


async def write_together(
    harness: EngineHarness, decoder: Decoder, asked: Sequence[list[int]], count: int, sampling: Sampling = GREEDY
) -> None:
    """A device for each prompt, all at once; each sequence is that of plain decoding."""
    expected = [plain(decoder, prompt, count, sampling) for prompt in asked]
    devices = [Device(harness, number, prompt, sampling) for number, prompt in enumerate(asked)]
    async with asyncio.TaskGroup() as group:
        for number, device in enumerate(devices):
            await device.open()
            group.create_task(device.write(expected[number], np.random.default_rng(number)))
    for device, sequence in zip(devices, expected, strict=True):
        assert device.tokens[: len(sequence)] == sequence


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_sessions_at_once_write_what_each_would_alone(scenario: Scenario, decoder: Decoder, sampling: Sampling) -> None:
    harness = scenario(lambda harness: write_together(harness, decoder, prompts(6), 30, sampling))
    used, steps = sum(harness.decoder.rows), len(harness.decoder.rows)
    assert harness.count("decoder_rows_total", kind="used") == used
    assert harness.count("decoder_rows_total", kind="padding") == WIDTH * steps - used
    assert harness.count("tokens_committed_total") >= 100
    assert harness.count("draft_tokens_total", result="accepted") > 0
    assert harness.count("draft_tokens_total", result="rejected") > 0
    assert harness.count("context_evictions_total", reason="budget") == 0


@pytest.mark.parametrize("pages", [3, 4, 5])
def test_sessions_that_evict_each_other_all_finish(scenario: Scenario, decoder: Decoder, pages: int) -> None:
    """Sequences grow from one page to two or three, so that even a single session may need all memory."""
    harness = scenario(
        lambda harness: write_together(harness, decoder, prompts(7, longest=80, seed=2), 70), pages=pages
    )
    assert harness.count("context_evictions_total", reason="budget") > 0
    assert harness.count("contexts_bytes") <= harness.budget_bytes


def test_many_sessions_share_a_narrow_step_fairly(scenario: Scenario) -> None:
    """With a long prompt beside them, at least two of 32 sessions are served in each step."""

    async def play(harness: EngineHarness) -> None:
        hog = Device(harness, 99, [4] * 200)
        devices = [Device(harness, number, [7, 8, number]) for number in range(32)]
        await hog.open()
        for device in devices:
            await device.open()
            await device.ask()
        hog.send()
        await until(lambda: len(harness.decoder.rows) > 40)
        before = len(harness.decoder.rows)

        async def steps(device: Device) -> int:
            await device.ask()
            return len(harness.decoder.rows) - before

        waited = await asyncio.gather(*(steps(device) for device in devices))
        assert max(waited) <= 32 // 2 + 2  # the step that was under way, and the hog itself
        await hog.receive()

    harness = scenario(play)
    assert max(harness.decoder.rows) <= WIDTH


def test_long_extensions_advance_together(scenario: Scenario) -> None:
    """32 sessions that always want a token get one in every fourth step."""

    async def play(harness: EngineHarness) -> None:
        devices = [Device(harness, number, [7, 8, 100 + number]) for number in range(32)]
        waits: list[int] = []

        async def stream(device: Device) -> None:
            await device.ask(extend=20)
            while len(device.tokens) < 24 and device.tokens[-1] not in ENDS:
                before = len(harness.decoder.rows)
                await device.receive()
                waits.append(len(harness.decoder.rows) - before)

        for device in devices:
            await device.open()
        await asyncio.gather(*map(stream, devices))
        assert len(waits) > 300
        assert max(waits) <= 32 // WIDTH + 10  # prompts of three tokens come first

    scenario(play)


def test_memory_for_one_is_shared_by_all_in_turn(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long extensions of others do not keep anyone waiting for ever, nor does each step evict."""
    monkeypatch.setattr(scheduler, "PROTECTED_STEPS", 5)

    async def play(harness: EngineHarness) -> None:
        devices = [Device(harness, number, [7, 8, 9]) for number in range(4)]
        for device in devices:
            await device.open()
        for device in devices[:3]:
            device.send(extend=50)
        await asyncio.gather(*(device.receive() for device in devices[:3]))
        before = len(harness.decoder.rows)
        await devices[3].ask()
        assert len(harness.decoder.rows) - before <= 3 * 8  # with steps that compute evicted caches again
        for device in devices[:3]:
            for _ in range(50):
                await device.receive()
        assert [device.tokens for device in devices[:3]] == [devices[0].tokens] * 3

    harness = scenario(play, pages=1)
    assert 10 <= harness.count("context_evictions_total", reason="budget") <= len(harness.decoder.rows) / 4


def test_a_large_session_is_not_overtaken_for_ever_by_small_ones(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "PROTECTED_STEPS", 5)
    monkeypatch.setattr(session, "AGED_STEPS", 5)

    async def play(harness: EngineHarness) -> None:
        devices = [Device(harness, number, [7, 8, 9]) for number in range(6)]
        large = Device(harness, 9, list(range(10, 110)))
        await large.open()
        for device in devices:
            await device.open()
        await devices[0].ask(extend=55)
        await devices[0].receive()  # so that turns do not end together
        for device in devices[1:]:
            device.send(extend=55)
        await asyncio.gather(*(device.receive() for device in devices[1:]))
        before = len(harness.decoder.rows)
        await large.ask()
        assert len(harness.decoder.rows) - before <= 100 // WIDTH + 3 * 5

    scenario(play, pages=2)
