"""An engine over fixed memory, as on a CUDA device: sequences are those of plain decoding, and no block is lost."""

from __future__ import annotations

import asyncio
import gc

import numpy as np
import pytest

from isthmus.models.errors import ContextGone
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.torch import paged_decoder
from isthmus.models.language.torch.decoder import PAGE_TOKENS, Decoder
from isthmus.models.language.torch.kv_pool import KVPool
from isthmus.models.language.torch.paged_decoder import PagedDecoder, record_nothing
from isthmus.models.torch_device import CPU
from tests.unit.cloud_service.language.tiny import Device, EngineHarness, Scenario, StateDevice, plain, prompts

PAGES = 5  # for all sessions: less than they need, so that some are evicted


@pytest.fixture
def decoder(decoder: Decoder, small_steps: None, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """The decoder of the other tests, with its caches in a pool and its passes of fixed shape."""
    monkeypatch.setattr(paged_decoder, "CHUNK_TOKENS", PAGE_TOKENS)
    pool = KVPool(decoder.config, decoder.dtype, CPU, decoder.new_cache().bytes_for(PAGE_TOKENS) * PAGES)
    return PagedDecoder(decoder, pool, record_nothing)


def free_blocks(decoder: Decoder) -> int:
    assert isinstance(decoder, PagedDecoder)
    gc.collect()
    return decoder._pool.free


def test_sessions_that_evict_each_other_write_what_plain_decoding_writes(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        devices = [Device(harness, number, prompt) for number, prompt in enumerate(prompts(4, 60, 2))]
        expected = [plain(decoder, device.tokens, 30) for device in devices]
        for device in devices:
            await device.open()
        writers = zip(devices, expected, map(np.random.default_rng, range(4)), strict=True)
        await asyncio.gather(*(device.write(tokens, rng) for device, tokens, rng in writers))
        assert [device.tokens[: len(tokens)] for device, tokens in zip(devices, expected, strict=True)] == expected

    free = free_blocks(decoder)
    harness = scenario(play, pages=PAGES)
    assert harness.count("context_evictions_total", reason="budget") > 0
    del harness
    assert free_blocks(decoder) == free


def test_hidden_states_and_prompts_that_skip_layers_share_the_pool(
    scenario: Scenario, decoder: Decoder, handoff: HandoffBundle
) -> None:
    async def write(device: StateDevice) -> None:
        count, base = len(device.tokens), -1
        while len(device.tokens) < count + 8:
            try:
                if base < 0:
                    await device.open()
                    base = 0
                base = len(device.tokens) - len((await device.ask(base)).tokens)
            except ContextGone:
                base = -1

    async def play(harness: EngineHarness) -> None:
        stateful = [StateDevice(harness, decoder, handoff, n, prompt) for n, prompt in enumerate(prompts(3, 50, 3))]
        skipping = Device(harness, 9, [*range(3, 123)], prefill_layers=handoff.depth)
        await skipping.open()
        await asyncio.gather(skipping.ask(extend=5), *map(write, stateful))

    free = free_blocks(decoder)
    harness = scenario(play, pages=PAGES)
    assert harness.count("state_positions_total", kind="filled") > 0
    del harness
    assert free_blocks(decoder) == free
