"""Whatever drafts are sent and however steps are cut, the committed tokens are those of decoding one at a time.

The model is scripted: logits are a function of all tokens before. The cache remembers which tokens were fed, so that a
token that is fed twice or not at all gives other logits.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.language.sequence import TokenSequence
from isthmus.models.errors import InvalidInput
from isthmus.models.language.sampling import Floats, choose, log_softmax
from isthmus.models.messages import GREEDY, Committed, Opening, Round, Sampling

VOCAB, EOS, CONTEXT = 8, 2, 24
SAMPLED = Sampling(temperature=1.0, top_p=0.9, seed=7)


def model(tokens: list[int]) -> Floats:
    """Logits (VOCAB,) of what follows `tokens`."""
    logits_V = np.random.default_rng(zlib.crc32(bytes(tokens))).normal(size=VOCAB).astype(np.float32)
    logits_V[EOS] -= 0.7  # or sequences would end early
    return logits_V


def one_by_one(prompt: list[int], sampling: Sampling) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < CONTEXT and (len(tokens) == len(prompt) or tokens[-1] != EOS):
        tokens.append(choose(model(tokens), sampling, len(tokens)))
    return tokens


class TokenCache:
    """Holds the tokens themselves."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.tokens[length:]


def new_sequence(prompt: list[int], sampling: Sampling = GREEDY, logprobs: int | None = None) -> TokenSequence:
    sequence = TokenSequence(prompt, Opening(b"", b"", 0, (), 0, sampling, logprobs), frozenset({EOS}), CONTEXT)
    evict(sequence)
    return sequence


def evict(sequence: TokenSequence) -> None:
    cache: Any = TokenCache()
    sequence.cache = cache


def compute(sequence: TokenSequence, count: int) -> Committed | None:
    """A step with `count` tokens of this sequence. Tokens that decide nothing have no logits."""
    cache: Any = sequence.cache
    needs_logits, rows = sequence.needs_logits(count), []
    for id_ in sequence.next_ids(count):
        cache.tokens.append(id_)
        rows.append(model(cache.tokens))
    assert len(rows) == count
    return sequence.complete_step(np.stack(rows) if needs_logits else None, count, 0.25)


def finish(sequence: TokenSequence, data: st.DataObject | None = None) -> Committed:
    """Steps of any sizes, with evictions in between, until the round is answered."""
    while True:
        pending_tokens = sequence.pending_tokens
        assert pending_tokens > 0
        count = pending_tokens if data is None else data.draw(st.integers(1, pending_tokens), "rows")
        committed = compute(sequence, count)
        if committed is not None:
            return committed
        if data is not None and data.draw(st.integers(0, 7), "evicted") == 0:
            evict(sequence)


def play(sequence: TokenSequence, round_: Round, data: st.DataObject | None = None) -> Committed:
    return sequence.begin(round_, 0.0) or finish(sequence, data)


class Device:
    """Keeps the tokens that the replies commit."""

    def __init__(self, prompt: list[int]) -> None:
        self.tokens = list(prompt)

    def take(self, committed: Committed, draft: tuple[int, ...] = ()) -> None:
        if committed.accepted or committed.tokens:
            self.tokens[committed.base :] = [*draft[: committed.accepted], *committed.tokens]


def draw_round(data: st.DataObject, length: int, expected: list[int]) -> Round:
    """Right, wrong or random tokens; overlapping the sequence, at its end or beyond; with an end of text; too many."""
    base = data.draw(st.integers(max(1, length - 3), length + 1), "base")
    count = data.draw(st.integers(0, 6) | st.just(CONTEXT + 2), "drafts")
    kind = data.draw(st.sampled_from(["right", "mostly", "random", "end"]), "kind")
    draft = []
    for position in range(base, base + count):
        right = expected[position] if position < len(expected) else EOS
        wrong = EOS if kind == "end" else data.draw(st.integers(0, VOCAB - 1), "token")
        take_right = kind == "right" or (kind != "random" and data.draw(st.integers(0, 5), "right") > 0)
        draft.append(right if take_right else wrong)
    return Round(base, tuple(draft), data.draw(st.integers(0, 3), "extend"))


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)


@given(prompt=prompts, sampling=st.sampled_from([GREEDY, SAMPLED]), data=st.data())
def test_any_drafts_and_steps_give_the_tokens_of_one_at_a_time(
    prompt: list[int], sampling: Sampling, data: st.DataObject
) -> None:
    expected = one_by_one(prompt, sampling)
    sequence, device = new_sequence(prompt, sampling), Device(prompt)
    for _ in range(data.draw(st.integers(1, 8), "rounds")):
        length = len(sequence.tokens)
        round_ = draw_round(data, length, expected)
        committed = play(sequence, round_, data)
        device.take(committed, round_.draft)
        assert sequence.tokens == expected[: len(sequence.tokens)]
        assert device.tokens == sequence.tokens
        fits = list(round_.draft[: max(length - round_.base, 0)]) == expected[round_.base : length][: len(round_.draft)]
        grows = round_.base <= length and fits and length < len(expected)
        assert (len(sequence.tokens) > length) == grows
        if sequence.scheduled is not None:
            sequence.next_extension(0.0)
        for _ in range(round_.extend if grows else 0):
            if sequence.scheduled is None or data.draw(st.integers(0, 4), "interrupted") == 0:
                break
            device.take(finish(sequence, data))
            assert device.tokens == sequence.tokens == expected[: len(sequence.tokens)]
            sequence.next_extension(0.0)
        sequence.scheduled = None


@given(prompt=prompts, sampling=st.sampled_from([GREEDY, SAMPLED]), data=st.data())
def test_log_probabilities_are_one_for_each_new_token(
    prompt: list[int], sampling: Sampling, data: st.DataObject
) -> None:
    expected = one_by_one(prompt, sampling)
    sequence = new_sequence(prompt, sampling, logprobs=2)
    while not sequence.finished:
        length = len(sequence.tokens)
        committed = play(sequence, draw_round(data, length, expected), data)
        if sequence.scheduled is not None:
            sequence.scheduled = None
        new = range(length, len(sequence.tokens))
        assert len(committed.logprobs) == len(new)
        for position, row in zip(new, committed.logprobs, strict=True):
            logs_V = log_softmax(model(expected[:position]))
            assert row.own == pytest.approx(logs_V[expected[position]])
            assert [id_ for id_, _ in row.top] == list(np.argsort(-logs_V)[:2])
            assert [value for _, value in row.top] == pytest.approx(sorted(logs_V)[:-3:-1])
        if not new:
            play(sequence, Round(length))
            sequence.scheduled = None


PROMPT = [3, 1, 3]
EXPECTED = one_by_one(PROMPT, GREEDY)


def test_the_sequence_of_these_tests_is_long_enough_to_mean_something() -> None:
    assert len(EXPECTED) >= 12


def test_a_right_draft_is_accepted_whole_and_a_token_follows() -> None:
    committed = play(new_sequence(PROMPT), Round(3, tuple(EXPECTED[3:7])))
    assert (committed.base, committed.accepted, committed.tokens) == (3, 4, (EXPECTED[7],))
    assert (committed.passes, committed.compute_s, committed.extension) == (1, 0.25, False)


def test_a_wrong_token_ends_the_draft_and_is_corrected() -> None:
    wrong = (EXPECTED[5] + 1) % VOCAB
    committed = play(new_sequence(PROMPT), Round(3, (*EXPECTED[3:5], wrong, EXPECTED[6])))
    assert (committed.base, committed.accepted, committed.tokens) == (3, 2, (EXPECTED[5],))


def test_a_draft_ahead_that_begins_with_the_committed_token_counts_it_as_accepted() -> None:
    sequence = new_sequence(PROMPT)
    play(sequence, Round(3, tuple(EXPECTED[3:5])))
    sequence.scheduled = None
    committed = play(sequence, Round(5, tuple(EXPECTED[5:8])))
    assert (committed.base, committed.accepted, committed.tokens) == (5, 3, (EXPECTED[8],))
    assert committed.passes == 1


def test_a_draft_ahead_of_another_token_is_stale_and_costs_no_step() -> None:
    sequence = new_sequence(PROMPT)
    play(sequence, Round(3, tuple(EXPECTED[3:5])))
    sequence.scheduled = None
    assert sequence.begin(Round(5, ((EXPECTED[5] + 1) % VOCAB, 0)), 0.0) == Committed(6)
    assert sequence.scheduled is None


def test_a_base_beyond_the_sequence_is_stale() -> None:
    assert new_sequence(PROMPT).begin(Round(4, (1,)), 0.0) == Committed(3)


def test_after_a_stale_round_the_cloud_may_generate_an_extension() -> None:
    sequence, device = new_sequence(PROMPT), Device(PROMPT)
    assert sequence.begin(Round(4, (1,), extend=2), 0.0) == Committed(3)
    for _ in range(2):
        committed = finish(sequence)
        assert committed.extension
        device.take(committed)
        sequence.next_extension(0.0)
    assert sequence.scheduled is None
    assert device.tokens == sequence.tokens == EXPECTED[:5]


def test_a_draft_that_ends_within_the_sequence_gets_the_rest() -> None:
    sequence = new_sequence(PROMPT)
    play(sequence, Round(3, tuple(EXPECTED[3:6])))
    sequence.scheduled = None
    committed = play(sequence, Round(3, (EXPECTED[3],)))
    assert (committed.base, committed.accepted, committed.tokens) == (3, 1, tuple(EXPECTED[4:8]))


def test_nothing_follows_an_end_of_text() -> None:
    sequence = new_sequence(PROMPT)
    while not sequence.finished:
        sequence.scheduled = None
        play(sequence, Round(len(sequence.tokens)))
    sequence.next_extension(0.0)
    assert sequence.scheduled is None
    assert sequence.begin(Round(len(EXPECTED)), 0.0) == Committed(len(EXPECTED))
    assert sequence.begin(Round(4, (EXPECTED[4],)), 0.0) == Committed(4, 1, tuple(EXPECTED[5:]))


def tokens_that_end() -> list[int]:
    """A prompt whose answer ends by itself, three tokens or more after it."""
    for first in range(VOCAB):
        for second in range(VOCAB):
            expected = one_by_one([first, second], GREEDY)
            if 5 <= len(expected) < CONTEXT - 4:
                return expected
    raise AssertionError("the scripted model never ends")


def test_an_end_of_text_inside_of_a_draft_is_the_last_token() -> None:
    expected = tokens_that_end()
    sequence = new_sequence(expected[:2])
    committed = play(sequence, Round(2, (*expected[2:], 5, 5)))
    assert (committed.accepted, committed.tokens) == (len(expected) - 2, ())
    assert sequence.finished and sequence.tokens == expected


def test_a_round_feeds_only_what_is_new() -> None:
    sequence = new_sequence(PROMPT)
    play(sequence, Round(3, (*EXPECTED[3:5], (EXPECTED[5] + 1) % VOCAB)))
    sequence.scheduled = None
    assert sequence.begin(Round(6, (1, 1)), 0.0) is None
    assert sequence.pending_tokens == 3  # the correction and two drafts


def test_tokens_computed_again_after_an_eviction_confirm_nothing_twice() -> None:
    sequence = new_sequence(PROMPT, logprobs=0)
    assert sequence.begin(Round(3, tuple(EXPECTED[3:7])), 0.0) is None
    assert compute(sequence, 5) is None
    evict(sequence)
    assert sequence.pending_tokens == 7
    assert compute(sequence, 2) is None
    committed = compute(sequence, 5)
    assert committed is not None
    assert (committed.accepted, committed.passes, len(committed.logprobs)) == (4, 3, 5)


def test_queue_time_ends_with_the_first_step() -> None:
    sequence = new_sequence(PROMPT)
    sequence.begin(Round(3), 10.0)
    assert sequence.scheduled is not None
    sequence.scheduled.started_s = 10.5
    assert finish(sequence).queue_s == 0.5


def test_states_are_for_sessions_of_a_handoff() -> None:
    sequence = new_sequence(PROMPT)
    sequence.check(Round(3, (1, 2), 5))
    with pytest.raises(InvalidInput, match="opened without a handoff"):
        sequence.check(Round(3, (1,), 1, (b"",)))


def test_the_context_is_filled_and_never_exceeded() -> None:
    for prompt in ([number, 0, 1] for number in range(VOCAB)):
        expected = one_by_one(prompt, GREEDY)
        sequence = new_sequence(prompt)
        while not sequence.finished:
            sequence.scheduled = None
            play(sequence, Round(len(sequence.tokens), (*expected[len(sequence.tokens) :], *[5] * CONTEXT)))
        assert sequence.tokens == expected


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        (10, [(10, False)]),
        (32, [(32, False)]),
        (40, [(16, False), (8, True), (16, False)]),
        (512, [(16, False), (464, True), (32, False)]),
    ],
)
def test_the_middle_of_a_prompt_may_skip_layers(tokens: int, parts: list[tuple[int, bool]]) -> None:
    """Neither its beginning nor its end, and no step has tokens of two runners."""
    for prefill_layers in (0, 20):
        sequence = TokenSequence(
            [1] * tokens, Opening(b"", b"", 0, (), 0, prefill_layers=prefill_layers), frozenset({EOS}), 1000
        )
        evict(sequence)
        sequence.begin(Round(tokens), 0.0)
        found, cache = [], sequence.cache
        while sequence.pending_tokens:
            found.append((sequence.pending_tokens, sequence.skips_upper_layers))
            cache.tokens += [1] * sequence.pending_tokens  # type: ignore[union-attr]
        assert found == (parts if prefill_layers else [(tokens, False)])
