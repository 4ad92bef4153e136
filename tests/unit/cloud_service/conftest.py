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
from tests.unit.cloud_service.language.tiny import CONTEXT, ENDS, WIDTH, EngineHarness, Play, Scenario


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
    """Caches grow by a page, so that short sequences compete for memory."""
    monkeypatch.setattr(kv_cache, "GROWTH_TOKENS", PAGE_TOKENS)


@pytest.fixture
def scenario(checkpoint: Checkpoint, decoder: Decoder, handoff: HandoffBundle, small_steps: None) -> Scenario:
    """Run a play beside an engine with memory for `pages` pages of 64 tokens."""

    def run(play: Play, pages: int = 100) -> EngineHarness:
        async def both() -> EngineHarness:
            harness = EngineHarness(checkpoint, decoder, pages, [handoff])
            running = asyncio.create_task(harness.engine.run())
            await asyncio.wait_for(play(harness), 60)
            harness.decoder.gate.set()
            harness.engine.drain()
            await asyncio.wait_for(running, 10)
            return harness

        harness = asyncio.run(both())
        assert harness.most_bytes <= harness.budget_bytes
        return harness

    return run
