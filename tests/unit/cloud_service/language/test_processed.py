"""What the model processed is told to whom it was processed for: every token once, in no more steps than it needs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from isthmus.models.language.flops import decoder_flops
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.torch.decoder import PAGE_TOKENS, Decoder
from isthmus.models.messages import NOTHING, Committed, Processed
from tests.unit.cloud_service.language.tiny import (
    WIDTH,
    Device,
    EngineHarness,
    Scenario,
    StateDevice,
    plain,
    prompts,
)

PROMPT = list(range(10, 50))


def sizes(decoder: Decoder, start: int, tokens: int, decided: int) -> int:
    return decoder_flops(decoder.config, start, tokens, layers=decoder.config.layers, decided=decided)


def test_single_tokens_catch_up_in_one_prefill_and_nothing_is_computed_twice(
    scenario: Scenario, decoder: Decoder
) -> None:
    """As a device queries them: the session is opened again with what it has made since."""
    replies: list[Committed] = []

    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, PROMPT)
        await device.open()
        replies.append(await device.ask())
        for made in (3, 1, 7):
            device.leave()
            start = len(device.tokens)
            device.tokens += [60 + number for number in range(made)]
            await device.open(start=start)
            replies.append(await device.ask())
        assert sum(harness.decoder.rows) == len(device.tokens) - 1, "each token once, but the last, which is new"

    harness = scenario(play)
    starts, counts = (0, 40, 44, 46), (40, 4, 2, 8)
    assert [reply.processed for reply in replies] == [
        Processed(count, sizes(decoder, start, count, 1)) for start, count in zip(starts, counts, strict=True)
    ]
    assert [reply.passes for reply in replies] == [40 // WIDTH, 1, 1, 1]
    assert harness.count("processed_tokens_total", kind="new") == sum(counts)
    assert harness.count("processed_tokens_total", kind="repeated") == 0
    assert harness.count("model_flops_total") == sum(reply.processed.flops for reply in replies)


def test_rows_of_drafts_count_and_rejected_ones_are_no_repetition(scenario: Scenario, decoder: Decoder) -> None:
    expected = plain(decoder, PROMPT, 8)
    replies: list[Committed] = []

    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, PROMPT)
        await device.open()
        replies.append(await device.ask(expected[40:43]))
        replies.append(await device.ask([(expected[44] + 1) % 250, 3, 3]))
        assert device.tokens == expected[:45]

    scenario(play)
    assert [reply.processed for reply in replies] == [
        Processed(43, sizes(decoder, 0, 43, 4)),
        Processed(4, sizes(decoder, 43, 4, 4)),
    ]


def test_what_an_eviction_has_computed_again_is_told(scenario: Scenario, decoder: Decoder) -> None:
    totals = [NOTHING, NOTHING]

    async def write(device: Device, index: int) -> None:
        while len(device.tokens) < 40 + PAGE_TOKENS:
            totals[index] += (await device.ask()).processed

    async def play(harness: EngineHarness) -> None:
        devices = [Device(harness, number, PROMPT) for number in range(2)]
        for device in devices:
            await device.open()
        async with asyncio.TaskGroup() as group:
            for index, device in enumerate(devices):
                group.create_task(write(device, index))

    harness = scenario(play, pages=3)
    assert harness.count("context_evictions_total", reason="budget") > 0
    length = 40 + PAGE_TOKENS
    assert [total.tokens - total.repeated for total in totals] == [length - 1] * 2
    assert sum(total.repeated for total in totals) == harness.count("processed_tokens_total", kind="repeated") > 0


def test_a_device_that_left_is_told_the_next_time(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        device = Device(harness, 1, PROMPT)
        await device.open()
        harness.decoder.gate.clear()
        device.send()
        while not harness.decoder.inside:
            await asyncio.sleep(0.001)
        device.leave()
        harness.decoder.gate.set()
        await device.open()
        reply = await device.ask()
        assert reply.held == WIDTH and reply.processed == Processed(40, sizes(decoder, 0, 40, 1))

    scenario(play)


@pytest.mark.parametrize("fill", [False, True])
def test_of_states_only_the_layers_after_the_cut_count(
    scenario: Scenario, decoder: Decoder, handoff: HandoffBundle, fill: bool
) -> None:
    prompt = prompts(1, longest=60, seed=4)[0]
    replies: list[Committed] = []

    async def play(harness: EngineHarness) -> None:
        device = StateDevice(harness, decoder, handoff, 1, prompt, fill=fill)
        await device.open()
        replies.append(await device.ask(0))
        replies.append(await device.ask(len(prompt)))
        replies.append(await device.ask(len(prompt)))  # the token's state again

    scenario(play)
    whole = sizes(decoder, 0, len(prompt), 1)
    assert [reply.processed.tokens for reply in replies] == [len(prompt), 1, 2]
    assert [reply.processed.repeated for reply in replies] == [0, 0, 1]
    suffix = decoder_flops(decoder.config, 0, len(prompt), layers=1, decided=1)
    assert replies[0].processed.flops == suffix < whole if not fill else replies[0].processed.flops < suffix


def test_a_prompt_that_skips_upper_layers_counts_for_less(scenario: Scenario, decoder: Decoder) -> None:
    replies: list[Committed] = []

    async def play(harness: EngineHarness) -> None:
        for name, layers in enumerate((0, 1)):
            device = Device(harness, name, np.arange(10, 90).tolist(), prefill_layers=layers)
            await device.open()
            replies.append(await device.ask())

    scenario(play)
    exact, skipping = (reply.processed for reply in replies)
    assert exact == Processed(80, sizes(decoder, 0, 80, 1))
    assert replace(skipping, flops=0) == Processed(80) and 0.5 * exact.flops < skipping.flops < 0.9 * exact.flops
