"""Beginnings that sessions have in common: found by blocks, copied bit for bit, and only from whom it is allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.language.prefixes import BLOCK_TOKENS, Prefixes
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.torch.decoder import PAGE_TOKENS, Decoder
from isthmus.models.messages import Committed
from tests.unit.cloud_service.language.tiny import SAMPLED, Device, EngineHarness, Scenario, plain

SYSTEM = np.random.default_rng(5).integers(3, 259, 2 * BLOCK_TOKENS + 9).tolist()
SHARED = 2 * BLOCK_TOKENS
texts = st.lists(st.integers(0, 1), max_size=5).map(lambda blocks: [id_ for id_ in blocks for _ in range(BLOCK_TOKENS)])


@given(st.dictionaries(st.binary(min_size=1, max_size=1), texts, max_size=5), texts, st.data())
def test_the_longest_beginning_is_found_while_it_is_held(
    held: dict[bytes, list[int]], text: list[int], data: st.DataObject
) -> None:
    prefixes = Prefixes()
    for session, tokens in held.items():
        for length in sorted([*data.draw(st.lists(st.integers(0, len(tokens)), max_size=2)), len(tokens)]):
            prefixes.record(session, "all", tokens, length)
    gone = data.draw(st.sets(st.sampled_from(sorted(held)))) if held else set()
    for session in gone:
        prefixes.drop(session)
    kept = {session: tokens for session, tokens in held.items() if session not in gone}
    found = list(prefixes.find("all", text))
    lengths = {
        stop
        for tokens in kept.values()
        for stop in range(BLOCK_TOKENS, len(text) + 1, BLOCK_TOKENS)
        if tokens[:stop] == text[:stop]
    }
    assert [stop for _, stop in found] == sorted(lengths, reverse=True)
    assert all(kept[session][:stop] == text[:stop] for session, stop in found)
    assert not list(prefixes.find("others", text))
    for session in kept:
        prefixes.drop(session)
    assert not prefixes._holders and not prefixes._keys


async def answered(harness: EngineHarness, name: int, text: list[int], **settings: object) -> tuple[Device, Committed]:
    device = Device(harness, name, text, **settings)  # type: ignore[arg-type]
    await device.open(logprobs=3)
    return device, await device.ask()


def state(device: Device, tokens: int) -> list[torch.Tensor]:
    assert device.session is not None and device.session.sequence.cache is not None
    cache = device.session.sequence.cache
    return [part.clone() for layer in cache._layers for part in cache.read(layer, tokens)]


@pytest.mark.parametrize("left", [False, True], ids=["live", "ended"])
def test_a_common_beginning_is_read_once_and_changes_no_bit(scenario: Scenario, left: bool) -> None:
    text = [*SYSTEM, 7, 8, 9]
    found: list[tuple[Committed, list[torch.Tensor]]] = []

    async def fresh(harness: EngineHarness) -> None:
        device, reply = await answered(harness, 2, text, sampling=SAMPLED)
        found.append((reply, state(device, len(text))))

    async def shared(harness: EngineHarness) -> None:
        first, _ = await answered(harness, 1, [*SYSTEM, 20, 21], peer="a")
        if left:
            first.leave()
        harness.decoder.rows.clear()
        device, reply = await answered(harness, 2, text, sampling=SAMPLED, peer="b")
        found.append((reply, state(device, len(text))))
        assert sum(harness.decoder.rows) == reply.processed.tokens == len(text) - SHARED
        assert reply.held == SHARED and reply.processed.repeated == 0

    scenario(fresh)
    harness = scenario(shared)
    (one, ones), (other, others) = found
    assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
    assert harness.count("shared_tokens_total") == SHARED


def test_what_a_session_goes_on_with_is_its_own(scenario: Scenario, decoder: Decoder) -> None:
    async def play(harness: EngineHarness) -> None:
        devices = [(await answered(harness, name, [*SYSTEM, name, name + 1]))[0] for name in range(20, 24)]
        expected = [plain(decoder, [*SYSTEM, name, name + 1], 12) for name in range(20, 24)]
        for device, tokens in zip(devices, expected, strict=True):
            await device.write(tokens, np.random.default_rng(0))
            assert device.tokens[: len(tokens)] == tokens

    assert scenario(play).count("shared_tokens_total") == 3 * SHARED


def test_after_an_eviction_there_is_nothing_to_copy(scenario: Scenario, decoder: Decoder) -> None:
    long = np.random.default_rng(6).integers(3, 259, PAGE_TOKENS + 9).tolist()

    async def play(harness: EngineHarness) -> None:
        first, _ = await answered(harness, 1, [*SYSTEM, 20])
        first.leave()
        other, _ = await answered(harness, 2, long)  # takes all of the memory
        other.leave()
        _, reply = await answered(harness, 3, [*SYSTEM, 30])
        assert reply.held == 0 and reply.processed.tokens == len(SYSTEM) + 1
        assert reply.tokens == tuple(plain(decoder, [*SYSTEM, 30], 1)[-1:])

    assert scenario(play, pages=2).count("shared_tokens_total") == 0


def test_a_prompt_that_skips_layers_shares_nothing(scenario: Scenario) -> None:
    """Which of its tokens do depends on its length."""

    async def play(harness: EngineHarness) -> None:
        text = [*SYSTEM, *SYSTEM]
        await answered(harness, 1, text, prefill_layers=1)
        assert (await answered(harness, 2, [*text, 5], prefill_layers=1))[1].held == 0
        assert (await answered(harness, 3, [*text, 6]))[1].held == 0

    scenario(play)


def test_isolated_peers_learn_nothing_of_each_other(checkpoint: Checkpoint, scenario: Scenario) -> None:
    async def play(harness: EngineHarness) -> None:
        harness.engine._sessions._isolated = True
        await answered(harness, 1, [*SYSTEM, 20], peer="a")
        assert (await answered(harness, 2, [*SYSTEM, 30], peer="b"))[1].held == 0
        assert (await answered(harness, 3, [*SYSTEM, 40], peer="a"))[1].held == SHARED

    scenario(play)


def test_two_texts_of_one_key_are_told_apart(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cloud_service.language.prefixes.next_key", lambda before, tokens, start: start)

    async def play(harness: EngineHarness) -> None:
        await answered(harness, 1, [*SYSTEM, 20])
        assert (await answered(harness, 2, [3, *SYSTEM]))[1].held == 0

    scenario(play)
