"""Sessions share passes and memory: none loses a token by it, and none waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from isthmus.cloud_service.language import engine as generation
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.messages import GREEDY, Sampling
from tests.unit.cloud_service.language.tiny import (
    ENDS,
    SAMPLED,
    WIDTH,
    Device,
    House,
    Scenario,
    plain,
    prompts,
    until,
)


async def write_together(
    house: House, decoder: Decoder, asked: Sequence[list[int]], count: int, sampling: Sampling = GREEDY
) -> None:
    """A device for each prompt, all at once; each text is that of plain decoding."""
    expected = [plain(decoder, prompt, count, sampling) for prompt in asked]
    devices = [Device(house, number, prompt, sampling) for number, prompt in enumerate(asked)]
    async with asyncio.TaskGroup() as group:
        for number, device in enumerate(devices):
            await device.open()
            group.create_task(device.write(expected[number], np.random.default_rng(number)))
    for device, text in zip(devices, expected, strict=True):
        assert device.tokens[: len(text)] == text


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_sessions_at_once_write_what_each_would_alone(scenario: Scenario, decoder: Decoder, sampling: Sampling) -> None:
    house = scenario(lambda house: write_together(house, decoder, prompts(6), 30, sampling))
    used, passes = sum(house.decoder.rows), len(house.decoder.rows)
    assert house.count("decoder_rows_total", kind="used") == used
    assert house.count("decoder_rows_total", kind="padding") == WIDTH * passes - used
    assert house.count("tokens_committed_total") >= 100
    assert house.count("draft_tokens_total", result="accepted") > 0
    assert house.count("draft_tokens_total", result="rejected") > 0
    assert house.count("context_evictions_total", reason="budget") == 0


@pytest.mark.parametrize("pages", [3, 4, 5])
def test_sessions_that_evict_each_other_all_finish(scenario: Scenario, decoder: Decoder, pages: int) -> None:
    """Texts grow from one page to two or three in the midst, so that even a single session may need all there is."""
    house = scenario(lambda house: write_together(house, decoder, prompts(7, longest=80, seed=2), 70), pages=pages)
    assert house.count("context_evictions_total", reason="budget") > 0
    assert house.count("contexts_bytes") <= house.budget_bytes


def test_many_sessions_on_a_narrow_pass_share_it_fairly(scenario: Scenario) -> None:
    """With a long prompt beside them, 32 sessions are served at least two a pass."""

    async def play(house: House) -> None:
        hog = Device(house, 99, [4] * 200)
        devices = [Device(house, number, [7, 8, number]) for number in range(32)]
        await hog.open()
        for device in devices:
            await device.open()
            await device.ask()
        hog.send()
        await until(lambda: len(house.decoder.rows) > 40)
        before = len(house.decoder.rows)

        async def passes(device: Device) -> int:
            await device.ask()
            return len(house.decoder.rows) - before

        waited = await asyncio.gather(*(passes(device) for device in devices))
        assert max(waited) <= 32 // 2 + 2  # the pass that was under way, and the hog itself
        await hog.receive()

    house = scenario(play)
    assert max(house.decoder.rows) <= WIDTH


def test_endless_texts_advance_together(scenario: Scenario) -> None:
    """32 sessions that always want a row get one in each fourth pass."""

    async def play(house: House) -> None:
        devices = [Device(house, number, [7, 8, 100 + number]) for number in range(32)]
        waits: list[int] = []

        async def stream(device: Device) -> None:
            await device.ask(extend=20)
            while len(device.tokens) < 24 and device.tokens[-1] not in ENDS:
                before = len(house.decoder.rows)
                await device.receive()
                waits.append(len(house.decoder.rows) - before)

        for device in devices:
            await device.open()
        await asyncio.gather(*map(stream, devices))
        assert len(waits) > 300
        assert max(waits) <= 32 // WIDTH + 10  # prompts of three rows come first

    scenario(play)


def test_memory_for_one_is_shared_by_all_in_turn(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long extensions of others do not keep anyone waiting for ever, nor does each pass evict."""
    monkeypatch.setattr(generation, "STAY_PASSES", 5)

    async def play(house: House) -> None:
        devices = [Device(house, number, [7, 8, 9]) for number in range(4)]
        for device in devices:
            await device.open()
        for device in devices[:3]:
            device.send(extend=50)
        await asyncio.gather(*(device.receive() for device in devices[:3]))
        before = len(house.decoder.rows)
        await devices[3].ask()
        assert len(house.decoder.rows) - before <= 3 * 8  # with passes that bring the texts in again
        for device in devices[:3]:
            for _ in range(50):
                await device.receive()
        assert [device.tokens for device in devices[:3]] == [devices[0].tokens] * 3

    house = scenario(play, pages=1)
    assert 10 <= house.count("context_evictions_total", reason="budget") <= len(house.decoder.rows) / 4


def test_a_large_session_is_not_overtaken_for_ever_by_small_ones(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "STAY_PASSES", 5)

    async def play(house: House) -> None:
        devices = [Device(house, number, [7, 8, 9]) for number in range(6)]
        large = Device(house, 9, list(range(10, 110)))
        await large.open()
        for device in devices:
            await device.open()
        await devices[0].ask(extend=55)
        await devices[0].receive()  # so that turns do not end together
        for device in devices[1:]:
            device.send(extend=55)
        await asyncio.gather(*(device.receive() for device in devices[1:]))
        before = len(house.decoder.rows)
        await large.ask()
        assert len(house.decoder.rows) - before <= 100 // WIDTH + 3 * 5

    scenario(play, pages=2)
