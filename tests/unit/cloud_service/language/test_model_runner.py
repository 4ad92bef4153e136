"""Each runner's step by itself, on the thread of the test, over a real, tiny decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.cloud_service.language import model_runner
from isthmus.cloud_service.language.handoff_sequence import MAX_FILLED_STATES, HandoffSequence
from isthmus.cloud_service.language.model_runner import FullRunner, PrefixRunner, SuffixRunner
from isthmus.cloud_service.language.sequence import TokenSequence
from isthmus.models.errors import InvalidInput, PayloadCorrupt
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.processors import TokenChooser
from isthmus.models.language.torch import kv_fill
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.language.torch.kv_fill import EXACT_FIRST
from isthmus.models.language.torch.kv_pool import KVPool
from isthmus.models.language.torch.paged_decoder import PagedDecoder, record_nothing
from isthmus.models.messages import GREEDY, Committed, Opening, Round
from tests.bench.tiny_llama import write_tiny_llama
from tests.one_device import META, OneDevice, without_pinning
from tests.tiny_handoff import write_tiny_handoff
from tests.unit.cloud_service.language.tiny import CONTEXT, ENDS, WIDTH, InstrumentedDecoder, plain, prompts, states_of

PROMPT = prompts(1, longest=60, seed=4)[0]
CHOOSER = TokenChooser(GREEDY)


def opening(**fields: Any) -> Opening:
    return Opening(b"", b"", 0, (), 0, **fields)


def full_runner(decoder: Any, *handoffs: HandoffBundle) -> FullRunner:
    return FullRunner(decoder, frozenset(ENDS), handoffs)


def token_sequence(runner: FullRunner, tokens: Sequence[int], round_: Round, prefill_layers: int = 0) -> TokenSequence:
    """With an empty cache and a scheduled round."""
    sequence = runner.new_sequence(tokens, opening(prefill_layers=prefill_layers), CHOOSER)
    sequence.cache = runner.decoder.new_cache()
    sequence.begin(round_, 0.0)
    return sequence


def handoff_sequence(runner: SuffixRunner, round_: Round, fill: int = 0) -> HandoffSequence:
    """With an empty cache and a scheduled round, whose states are at rate 0, the last one at rate 1."""
    sequence = runner.new_sequence(
        (), opening(handoff=runner.name, rate=1, context_rate=0, prefill_layers=fill), CHOOSER
    )
    sequence.cache = runner.decoder.new_cache()
    sequence.begin(round_, 0.0)
    return sequence


def states_round(decoder: Decoder, handoff: HandoffBundle, tokens: Sequence[int], extend: int = 1) -> Round:
    decided = {len(tokens) - 1} if extend else set()
    return Round(0, tuple(tokens), extend, tuple(states_of(decoder, handoff, tokens, 0, 0, 1, decided)))


def committed(outcome: object) -> Committed:
    assert isinstance(outcome, Committed)
    return outcome


def read(cache: KVCache | None, layers: range) -> list[torch.Tensor]:
    """Keys and values of some layers."""
    assert cache is not None
    return [part for layer in layers for part in cache.read(layer, cache.length)]


def test_a_step_of_all_layers_computes_each_sequence_as_plain_decoding(decoder: Decoder) -> None:
    instrumented = InstrumentedDecoder(decoder)
    runner = full_runner(instrumented)
    expected = plain(decoder, [5, 6, 7], 3)
    first = token_sequence(runner, [5, 6, 7], Round(3, tuple(expected[3:5])))
    second = token_sequence(runner, [9, 8], Round(2))
    result = runner.run([(first, 5), (second, 2)])
    replies = [committed(outcome) for outcome in result.outcomes]
    assert (replies[0].accepted, replies[0].tokens) == (2, (expected[5],))
    assert [9, 8, *replies[1].tokens] == plain(decoder, [9, 8], 1)
    assert (result.tokens, result.filled, instrumented.rows) == (7, 0, [7])
    assert [reply.passes for reply in replies] == [1, 1] and replies[0].compute_s > 0


def test_a_sequence_that_is_not_done_has_no_outcome_beside_one_that_is(decoder: Decoder) -> None:
    runner = full_runner(decoder)
    long, short = token_sequence(runner, PROMPT, Round(len(PROMPT))), token_sequence(runner, [9, 8], Round(2))
    result = runner.run([(long, 5), (short, 2)])
    assert result.outcomes[0] is None and committed(result.outcomes[1]).base == 2
    assert long.cache is not None and long.cache.length == 5
    assert long.pending_tokens == len(PROMPT) - 5


def test_logits_are_computed_only_when_a_token_is_decided(decoder: Decoder) -> None:
    instrumented, computed = InstrumentedDecoder(decoder), list[int]()

    def logits(x_NH: torch.Tensor) -> torch.Tensor:
        computed.append(len(instrumented.rows))
        return decoder.logits(x_NH)

    instrumented.logits = logits
    runner = full_runner(instrumented)
    sequence = token_sequence(runner, [5, 6, 7], Round(3))
    assert runner.run([(sequence, 2)]).outcomes == [None]
    assert computed == []
    committed(runner.run([(sequence, 1)]).outcomes[0])
    assert computed == [2]


def test_the_middle_of_a_prompt_has_a_prefix_runner_and_the_rest_the_full_one(
    decoder: Decoder, handoff: HandoffBundle
) -> None:
    runner, found = full_runner(decoder, handoff), list[tuple[object, int]]()
    sequence = token_sequence(runner, PROMPT, Round(len(PROMPT)), prefill_layers=handoff.depth)
    exact = token_sequence(runner, PROMPT, Round(len(PROMPT)))
    outcome: object = None
    while outcome is None:
        found.append((runner.next_runner(sequence), sequence.pending_tokens))
        (outcome,) = runner.next_runner(sequence).run([(sequence, min(sequence.pending_tokens, WIDTH))]).outcomes
        assert runner.next_runner(exact) is runner
    prefix = [each for each, _ in found if each is not runner]
    assert prefix and all(isinstance(each, PrefixRunner) and each is prefix[0] for each in prefix)
    assert [each is runner for each, _ in found[:2] + found[-2:]] == [True] * 4, "the beginning and the end"
    assert committed(outcome).passes == len(found)


def test_a_prefix_step_fills_the_upper_layers_and_ends_no_round(decoder: Decoder, handoff: HandoffBundle) -> None:
    instrumented = InstrumentedDecoder(decoder)
    runner = full_runner(instrumented, handoff)
    filled, exact = (
        token_sequence(runner, PROMPT, Round(len(PROMPT)), prefill_layers=layers) for layers in (handoff.depth, 0)
    )
    for sequence in (filled, exact):
        runner.run([(sequence, EXACT_FIRST // 2)])
        runner.run([(sequence, EXACT_FIRST // 2)])
    instrumented.rows.clear()
    result = runner.next_runner(filled).run([(filled, 4)])
    runner.run([(exact, 4)])
    assert (result.outcomes, result.tokens, result.filled) == ([None], 4, 4)
    assert instrumented.rows == [4, 4]
    assert filled.cache is not None and filled.cache.length == EXACT_FIRST + 4
    lower, upper = range(handoff.depth), range(handoff.depth, decoder.config.layers)
    pairs = zip(read(filled.cache, lower), read(exact.cache, lower), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    pairs = zip(read(filled.cache, upper), read(exact.cache, upper), strict=True)
    assert not all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_of_several_handoffs_the_deepest_that_fits_fills(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path / "four", layers=4, context=CONTEXT))
    decoder = Decoder.load(checkpoint, torch.float32, WIDTH)
    handoffs = {
        depth: HandoffBundle.open(write_tiny_handoff(tmp_path / str(depth), checkpoint, depth=depth), checkpoint)
        for depth in (3, 1, 2)
    }
    every = full_runner(decoder, *handoffs.values())

    def cache_of(runner: FullRunner) -> list[torch.Tensor]:
        sequence = token_sequence(runner, PROMPT, Round(len(PROMPT)), prefill_layers=2)
        while sequence.cache is not None and sequence.cache.length < EXACT_FIRST + WIDTH:
            runner.next_runner(sequence).run([(sequence, WIDTH)])
        return read(sequence.cache, range(4))

    found = cache_of(every)
    same = {depth: all(map(torch.equal, found, cache_of(full_runner(decoder, handoffs[depth])))) for depth in (1, 2)}
    assert same == {1: False, 2: True}


def test_prefill_layers_that_no_fill_allows_are_refused(decoder: Decoder, handoff: HandoffBundle) -> None:
    with pytest.raises(InvalidInput, match="no handoff bundle is held here"):
        full_runner(decoder).new_sequence(PROMPT, opening(prefill_layers=1), CHOOSER)
    with pytest.raises(InvalidInput, match="2 layers of a prompt, expected 1 to 1, or 0 for all"):
        full_runner(decoder, handoff).new_sequence(PROMPT, opening(prefill_layers=2), CHOOSER)


def test_a_step_of_states_decides_a_token_from_the_last(decoder: Decoder, handoff: HandoffBundle) -> None:
    instrumented: Any = InstrumentedDecoder(decoder)
    runner = SuffixRunner(handoff, instrumented)
    first, second = PROMPT[:5], PROMPT[5:8]
    sequences = [handoff_sequence(runner, states_round(decoder, handoff, tokens)) for tokens in (first, second)]
    assert all(runner.next_runner(each) is runner for each in sequences)
    result = runner.run([(sequences[0], 5), (sequences[1], 2)])
    assert (result.tokens, result.filled) == (7, 0)
    assert len(committed(result.outcomes[0]).tokens) == 1 and result.outcomes[1] is None
    assert sequences[1].tokens == second[:2]
    result = runner.run([(sequences[1], 1)])
    assert len(committed(result.outcomes[0]).tokens) == 1
    assert instrumented.depths[-1] == handoff.depth


def test_states_in_a_batch_give_the_bits_that_they_give_alone(decoder: Decoder, handoff: HandoffBundle) -> None:
    runner = SuffixRunner(handoff, decoder)
    rounds = [states_round(decoder, handoff, tokens) for tokens in (PROMPT[:4], PROMPT[4:8])]
    together, alone = ([handoff_sequence(runner, round_) for round_ in rounds] for _ in range(2))
    outcomes = runner.run([(each, 4) for each in together]).outcomes
    single = [runner.run([(each, 4)]).outcomes[0] for each in alone]
    assert [committed(each).tokens for each in outcomes] == [committed(each).tokens for each in single]
    for ours, theirs in zip(together, alone, strict=True):
        layers = runner.decoder.layers
        assert all(map(torch.equal, read(ours.cache, layers), read(theirs.cache, layers)))


def test_a_corrupt_state_fails_its_own_round_only(decoder: Decoder, handoff: HandoffBundle) -> None:
    runner, good = SuffixRunner(handoff, decoder), states_round(decoder, handoff, PROMPT[:4])
    bad = Round(0, good.draft, 1, (*good.states[:2], b"\xff" * 100, good.states[3]))
    spoilt, fine = handoff_sequence(runner, bad), handoff_sequence(runner, good)
    result = runner.run([(spoilt, 4), (fine, 4)])
    assert isinstance(result.outcomes[0], PayloadCorrupt) and len(committed(result.outcomes[1]).tokens) == 1
    assert result.tokens == 4
    assert spoilt.tokens == [] and spoilt.cache is not None and spoilt.cache.length == 0


def test_a_step_that_only_fills_has_no_forward_pass(decoder: Decoder, handoff: HandoffBundle) -> None:
    instrumented: Any = InstrumentedDecoder(decoder)
    runner, tokens = SuffixRunner(handoff, instrumented), (PROMPT * 3)[: MAX_FILLED_STATES + 5]
    sequence = handoff_sequence(runner, states_round(decoder, handoff, tokens, extend=0), fill=handoff.depth)
    first = runner.run([(sequence, 1)])
    assert (first.outcomes, first.tokens, first.filled) == ([None], 0, MAX_FILLED_STATES)
    forward_passes = len(instrumented.rows)  # of the first token alone, which is never filled in
    second = runner.run([(sequence, 1)])
    assert committed(second.outcomes[0]).tokens == ()
    assert (second.tokens, second.filled, len(instrumented.rows)) == (0, 5, forward_passes)


def test_the_hidden_state_of_a_first_token_is_computed_once(decoder: Decoder, handoff: HandoffBundle) -> None:
    instrumented: Any = InstrumentedDecoder(decoder)
    runner, round_ = SuffixRunner(handoff, instrumented), states_round(decoder, handoff, PROMPT[:3])
    for _ in range(3):
        runner.run([(handoff_sequence(runner, round_), 3)])
    assert instrumented.depths.count(0) == 1


def test_rates_and_depths_that_the_bundle_lacks_are_refused(decoder: Decoder, handoff: HandoffBundle) -> None:
    runner = SuffixRunner(handoff, decoder)
    for fields in ({"rate": 2}, {"context_rate": 2}):
        with pytest.raises(InvalidInput, match="rate 2 does not exist, the handoff has rates 0 to 1"):
            runner.new_sequence((), opening(**fields), CHOOSER)
    with pytest.raises(InvalidInput, match=f"the handoff is after layer {handoff.depth}"):
        runner.new_sequence((), opening(prefill_layers=handoff.depth + 1), CHOOSER)


def test_on_a_device_steps_compute_with_nothing_that_is_elsewhere(
    checkpoint: Checkpoint, decoder: Decoder, handoff: HandoffBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens through all layers and through the first only, and states through the last, exact and filled."""
    without_pinning(monkeypatch)
    for module in (model_runner, kv_fill):
        monkeypatch.setattr(module, "download", lambda tensor: np.zeros(tensor.shape, np.float32))
    loaded = Decoder.load(checkpoint, torch.float32, WIDTH, META)
    device = PagedDecoder(loaded, KVPool(loaded.config, loaded.dtype, META, 4 << 20), record_nothing)
    full, suffix = full_runner(device, handoff), SuffixRunner(handoff, device)
    sequence = token_sequence(full, PROMPT, Round(len(PROMPT)), prefill_layers=handoff.depth)
    states = handoff_sequence(suffix, states_round(decoder, handoff, PROMPT), fill=handoff.depth)
    outcomes: list[object] = [None, None]
    with OneDevice():
        while outcomes[0] is None:
            step = [(sequence, min(sequence.pending_tokens, WIDTH))]
            (outcomes[0],) = full.next_runner(sequence).run(step).outcomes
        while outcomes[1] is None:
            (outcomes[1],) = suffix.run([(states, min(states.pending_tokens, WIDTH))]).outcomes
    assert [committed(outcome).tokens for outcome in outcomes] == [(0,), (0,)]
