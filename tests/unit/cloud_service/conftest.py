from __future__ import annotations

import asyncio

import pytest
import torch

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.torch import kv_cache
from isthmus.models.language.torch.decoder import PAGE_TOKENS, Decoder
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff
from tests.unit.cloud_service.language.tiny import CONTEXT, ENDS, WIDTH, House, Play, Scenario


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", context=CONTEXT))
    assert checkpoint.tokenizer.eos_ids == ENDS
    return checkpoint


@pytest.fixture(scope="session")
def decoder(checkpoint: Checkpoint) -> Decoder:
    return Decoder.load(checkpoint, torch.float32, WIDTH)


@pytest.fixture(scope="session")
def handoff(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> HandoffBundle:
    """The device runs the first of two layers."""
    return HandoffBundle.open(write_tiny_handoff(tmp_path_factory.mktemp("handoffs") / "tiny", checkpoint), checkpoint)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches grow by a page, so that short texts compete for memory."""
    monkeypatch.setattr(kv_cache, "GROWTH_TOKENS", PAGE_TOKENS)


@pytest.fixture
def scenario(checkpoint: Checkpoint, decoder: Decoder, handoff: HandoffBundle, small_steps: None) -> Scenario:
    """Run a play beside the passes of a generation with memory for `pages` pages of 64 tokens."""

    def run(play: Play, pages: int = 100) -> House:
        async def both() -> House:
            house = House(checkpoint, decoder, pages, [handoff])
            running = asyncio.create_task(house.generation.run())
            await asyncio.wait_for(play(house), 60)
            house.decoder.gate.set()
            house.generation.drain()
            await asyncio.wait_for(running, 10)
            return house

        house = asyncio.run(both())
        assert house.most_bytes <= house.budget_bytes
        return house

    return run
