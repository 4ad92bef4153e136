"""Whatever rounds a device sends and however steps and evictions fall, the cache holds the tokens of the device.

States are scripted: a token's state is its position and its id. The cache remembers which states it was fed, and
whether each ran through the layers or was filled in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.language.handoff_sequence import MAX_FILLED_STATES, HandoffSequence
from isthmus.models.errors import InvalidInput, PayloadTooLarge
from isthmus.models.language.sampling import Floats, choose
from isthmus.models.language.torch.kv_fill import EXACT_LAST
from isthmus.models.messages import GREEDY, Committed, Opening, Round, Sampling

VOCAB, CONTEXT, CAP = 8, 120, 10
SAMPLED = Sampling(temperature=1.0, top_p=0.9, seed=7)


def state_of(position: int, token: int) -> bytes:
    return bytes([position, token])


def model(fed: list[tuple[bytes, bool]]) -> Floats:
    """Logits (VOCAB,) after states, and how each was computed."""
    seed = [value for state, run in fed for value in (*state, run)]
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32)


class StateCache:
    """Holds (state, whether it ran) of each position."""

    def __init__(self) -> None:
        self.fed: list[tuple[bytes, bool]] = []

    @property
    def length(self) -> int:
        return len(self.fed)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.fed[length:]


def new_sequence(sampling: Sampling = GREEDY, fill: bool = False, logprobs: int | None = None) -> HandoffSequence:
    opening = Opening(b"", b"", 0, (), 0, sampling, logprobs, handoff=b"x", prefill_layers=int(fill))
    sequence = HandoffSequence((), opening, CAP, CONTEXT)
    give_memory(sequence)
    return sequence


def give_memory(sequence: HandoffSequence) -> None:
    cache: Any = StateCache()
    sequence.cache = sequence.cache or cache


def compute(sequence: HandoffSequence, count: int) -> Committed | None:
    cache: Any = sequence.cache
    states, run = sequence.next_states(count)
    assert states and 0 <= run <= count
    assert len(states) - run <= MAX_FILLED_STATES
    cache.fed += [(state, index >= len(states) - run) for index, state in enumerate(states)]
    return sequence.complete_step(model(cache.fed) if sequence.needs_logits else None, 0.25)


def finish(sequence: HandoffSequence, data: st.DataObject | None = None) -> Committed | None:
    """Steps of any sizes until the round is answered; None when an eviction in between lost it."""
    while not sequence.lost:
        give_memory(sequence)
        assert sequence.pending_tokens > 0
        most = sequence.pending_tokens
        committed = compute(sequence, most if data is None else data.draw(st.integers(1, most), "states"))
        if committed is not None:
            sequence.next_extension(0.0)
            return committed
        if data is not None and data.draw(st.integers(0, 7), "evicted") == 7:
            sequence.drop_cache()
    sequence.scheduled = None
    return None


def round_of(tokens: list[int], base: int, extend: int = 1) -> Round:
    states = [state_of(position, token) for position, token in enumerate(tokens)][base:]
    return Round(base, tuple(tokens[base:]), extend, tuple(states))


@given(sampling=st.sampled_from([GREEDY, SAMPLED]), fill=st.booleans(), data=st.data())
def test_any_rounds_and_steps_give_the_tokens_of_the_device(
    sampling: Sampling, fill: bool, data: st.DataObject
) -> None:
    sequence, tokens, expected = new_sequence(sampling, fill, logprobs=1), list[int](), list[tuple[bytes, bool]]()
    for _ in range(data.draw(st.integers(1, 8), "rounds")):
        base = data.draw(st.integers(0, min(len(tokens) + 1, CONTEXT - 2)), "base")
        new = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), "new")
        if data.draw(st.integers(0, 9), "long") == 9:
            new = new * 9
        extend = data.draw(st.integers(0, 1), "extend")
        tokens = [*tokens[:base], *[0] * (base - len(tokens)), *new][: CONTEXT - 1]
        if data.draw(st.integers(0, 9), "evicted between") == 9:
            sequence.drop_cache()
        held = len(sequence.tokens)
        sequence.begin(round_of(tokens, base, extend), 0.0)
        assert sequence.lost == (base > held)
        committed = finish(sequence, data)
        if committed is None:
            sequence.drop_cache()
            tokens, expected = [], []
            continue
        stop, exact = len(tokens), extend if base else extend * EXACT_LAST
        expected[base:] = [
            (state_of(position, tokens[position]), not fill or position >= stop - exact)
            for position in range(base, stop)
        ]
        cache: Any = sequence.cache
        assert sequence.tokens == tokens
        assert cache.fed == expected
        assert (committed.base, committed.accepted, committed.extension) == (base, 0, False)
        assert committed.tokens == ((choose(model(expected), sampling, stop),) if extend else ())
        assert len(committed.logprobs) == extend


def test_an_eviction_in_the_midst_loses_a_round_that_builds_on_others() -> None:
    for base, lost in ((0, False), (3, True)):
        sequence = new_sequence()
        sequence.begin(round_of([1, 2, 3], 0), 0.0)
        finish(sequence)
        sequence.begin(round_of([1, 2, 3, 4, 5, 6], base), 0.0)
        assert compute(sequence, 2) is None
        sequence.drop_cache()
        assert sequence.lost == lost


def test_a_failed_round_leaves_the_sequence_at_its_base() -> None:
    sequence = new_sequence()
    sequence.begin(round_of([1, 2, 3], 0), 0.0)
    finish(sequence)
    sequence.begin(round_of([1, 2, 4, 5, 6], 2), 0.0)
    compute(sequence, 2)
    sequence.rewind()
    assert sequence.tokens == [1, 2] and sequence.cache is not None and sequence.cache.length == 2


def test_the_final_length_is_what_the_round_will_hold() -> None:
    sequence = new_sequence()
    sequence.begin(round_of([1, 2, 3, 4], 0), 0.0)
    assert (sequence.final_length, sequence.pending_tokens) == (4, 4)
    compute(sequence, 3)
    assert (sequence.final_length, sequence.pending_tokens, sequence.tokens) == (4, 1, [1, 2, 3])
    finish(sequence)
    assert (sequence.final_length, sequence.pending_tokens, sequence.reusable_length) == (4, 0, 4)


def states_run(sequence: HandoffSequence, width: int) -> list[tuple[int, int]]:
    """States filled in and run in each step of `width` states."""
    steps = []
    while sequence.scheduled is not None and sequence.pending_tokens:
        states, run = sequence.next_states(min(sequence.pending_tokens, width))
        steps.append((len(states) - run, run))
        if compute(sequence, min(sequence.pending_tokens, width)) is not None:
            sequence.next_extension(0.0)
    return steps


def test_a_fill_leaves_the_end_of_a_prompt_to_the_layers() -> None:
    sequence = new_sequence(fill=True)
    sequence.begin(round_of([1] * (2 * MAX_FILLED_STATES + EXACT_LAST), 0), 0.0)
    assert sequence.pending_tokens == 1, "a step that only fills"
    assert states_run(sequence, 10) == [(MAX_FILLED_STATES, 0), (MAX_FILLED_STATES, 10), (0, EXACT_LAST - 10)]


def test_after_a_prompt_a_fill_takes_one_token_of_a_step_at_most() -> None:
    sequence, tokens = new_sequence(fill=True), [1] * (2 * MAX_FILLED_STATES + 2)
    sequence.begin(round_of(tokens[:1], 0), 0.0)
    finish(sequence)
    sequence.begin(round_of(tokens, 1), 0.0)
    assert sequence.pending_tokens == 1
    assert states_run(sequence, 16) == [(MAX_FILLED_STATES, 0), (MAX_FILLED_STATES, 1)]


def test_what_decides_or_has_decided_has_a_rate_of_its_own() -> None:
    opening = Opening(b"", b"", 0, (), 0, handoff=b"x", rate=5, context_rate=2)
    sequence = HandoffSequence((), opening, CAP, CONTEXT)
    give_memory(sequence)
    states = tuple(state_of(position, position) for position in range(4))
    sequence.begin(Round(0, (0, 1, 2, 3), 1, states, decoded_from=(1,)), 0.0)
    assert [sequence.rate_at(position) for position in range(4)] == [2, 5, 2, 5]
    assert [sequence.id_at(position) for position in range(4)] == [0, 1, 2, 3]
    finish(sequence)
    sequence.begin(Round(4, (6, 7), 0, states[:2]), 0.0)
    assert [sequence.rate_at(position) for position in (4, 5)] == [2, 2], "nothing is asked for"
    assert [sequence.id_at(position) for position in (3, 4, 5)] == [3, 6, 7]


def test_times_and_steps_are_summed() -> None:
    sequence = new_sequence()
    sequence.begin(round_of([1, 2, 3, 4], 0), 10.0)
    assert sequence.scheduled is not None
    sequence.scheduled.started_s = 10.5
    compute(sequence, 3)
    committed = compute(sequence, 1)
    assert committed is not None
    assert (committed.queue_s, committed.compute_s, committed.passes) == (0.5, 0.5, 2)


@pytest.mark.parametrize(
    ("round_", "kind"),
    [
        (Round(0, (), 1), InvalidInput),
        (Round(0, (1,), 1, (bytes(CAP + 1),)), PayloadTooLarge),
        (Round(CONTEXT, (1,), 0, (b"",)), InvalidInput),
        (Round(CONTEXT - 1, (1,), 1, (b"",)), InvalidInput),
    ],
)
def test_a_round_that_can_never_be_accepted(round_: Round, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        new_sequence().check(round_)


def test_the_longest_rounds_that_can_be_accepted() -> None:
    new_sequence().check(Round(CONTEXT - 1, (1,), 0, (bytes(CAP),)))
    new_sequence().check(Round(CONTEXT - 2, (1,), 1, (b"",)))
