"""Whatever rounds a device sends and however passes and evictions fall, the state is that of the text as it says.

States are scripted: a token's state says where it stands and what it is. The cache remembers which it was fed, and
whether each ran through the layers or was filled in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud_service.language.handoff_sequence import FILL_ROWS, HandoffSequence
from isthmus.models.errors import InvalidInput, PayloadTooLarge
from isthmus.models.language.sampling import Floats, choose
from isthmus.models.language.torch.kv_fill import EXACT_LAST
from isthmus.models.messages import GREEDY, Committed, Opening, Round, Sampling

VOCAB, CONTEXT, CAP = 8, 120, 10
SAMPLED = Sampling(temperature=1.0, top_p=0.9, seed=7)


def state_of(position: int, token: int) -> bytes:
    return bytes([position, token])


def model(fed: list[tuple[bytes, bool]]) -> Floats:
    """Logits (VOCAB,) behind states and how each was taken."""
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


def new_text(sampling: Sampling = GREEDY, fill: bool = False, logprobs: int | None = None) -> HandoffSequence:
    opening = Opening(b"", b"", 0, (), 0, sampling, logprobs, handoff=b"x", prefill_layers=int(fill))
    text = HandoffSequence((), opening, CAP, CONTEXT)
    give_memory(text)
    return text


def give_memory(text: HandoffSequence) -> None:
    cache: Any = StateCache()
    text.cache = text.cache or cache


def compute(text: HandoffSequence, rows: int) -> Committed | None:
    cache: Any = text.cache
    states, run = text.next_states(rows)
    assert states and 0 <= run <= rows
    assert len(states) - run <= FILL_ROWS
    cache.fed += [(state, index >= len(states) - run) for index, state in enumerate(states)]
    return text.settle(model(cache.fed) if text.decides else None, 0.25)


def finish(text: HandoffSequence, data: st.DataObject | None = None) -> Committed | None:
    """Passes of any sizes until the round is answered; None when an eviction in between lost it."""
    while not text.lost:
        give_memory(text)
        assert text.rows > 0
        rows = text.rows if data is None else data.draw(st.integers(1, text.rows), "rows")
        committed = compute(text, rows)
        if committed is not None:
            text.next_extension(0.0)
            return committed
        if data is not None and data.draw(st.integers(0, 7), "evicted") == 7:
            text.forget()
    text.work = None
    return None


def round_of(tokens: list[int], base: int, extend: int = 1) -> Round:
    states = [state_of(position, token) for position, token in enumerate(tokens)][base:]
    return Round(base, tuple(tokens[base:]), extend, tuple(states))


@given(sampling=st.sampled_from([GREEDY, SAMPLED]), fill=st.booleans(), data=st.data())
def test_any_rounds_and_passes_give_the_text_of_the_device(sampling: Sampling, fill: bool, data: st.DataObject) -> None:
    text, tokens, expected = new_text(sampling, fill, logprobs=1), list[int](), list[tuple[bytes, bool]]()
    for _ in range(data.draw(st.integers(1, 8), "rounds")):
        base = data.draw(st.integers(0, min(len(tokens) + 1, CONTEXT - 2)), "base")
        new = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), "new")
        if data.draw(st.integers(0, 9), "long") == 9:
            new = new * 9
        extend = data.draw(st.integers(0, 1), "extend")
        tokens = [*tokens[:base], *[0] * (base - len(tokens)), *new][: CONTEXT - 1]
        if data.draw(st.integers(0, 9), "evicted between") == 9:
            text.forget()
        held = len(text.tokens)
        text.begin(round_of(tokens, base, extend), 0.0)
        assert text.lost == (base > held)
        committed = finish(text, data)
        if committed is None:
            text.forget()
            tokens, expected = [], []
            continue
        stop, exact = len(tokens), extend if base else extend * EXACT_LAST
        expected[base:] = [
            (state_of(position, tokens[position]), not fill or position >= stop - exact)
            for position in range(base, stop)
        ]
        cache: Any = text.cache
        assert text.tokens == tokens
        assert cache.fed == expected
        assert (committed.base, committed.accepted, committed.extension) == (base, 0, False)
        assert committed.tokens == ((choose(model(expected), sampling, stop),) if extend else ())
        assert len(committed.logprobs) == extend


def test_an_eviction_in_the_midst_loses_a_round_that_builds_on_others() -> None:
    for base, lost in ((0, False), (3, True)):
        text = new_text()
        text.begin(round_of([1, 2, 3], 0), 0.0)
        finish(text)
        text.begin(round_of([1, 2, 3, 4, 5, 6], base), 0.0)
        assert compute(text, 2) is None
        text.forget()
        assert text.lost == lost


def test_a_failed_round_leaves_the_text_at_its_base() -> None:
    text = new_text()
    text.begin(round_of([1, 2, 3], 0), 0.0)
    finish(text)
    text.begin(round_of([1, 2, 4, 5, 6], 2), 0.0)
    compute(text, 2)
    text.cut()
    assert text.tokens == [1, 2] and text.cache is not None and text.cache.length == 2


def test_the_extent_is_what_the_round_will_hold() -> None:
    text = new_text()
    text.begin(round_of([1, 2, 3, 4], 0), 0.0)
    assert (text.extent, text.rows) == (4, 4)
    compute(text, 3)
    assert (text.extent, text.rows, text.tokens) == (4, 1, [1, 2, 3])
    finish(text)
    assert (text.extent, text.rows, text.reusable) == (4, 0, 4)


def rows_run(text: HandoffSequence, width: int) -> list[tuple[int, int]]:
    """States filled in and run in each pass of so many rows."""
    passes = []
    while text.work is not None and text.rows:
        states, run = text.next_states(min(text.rows, width))
        passes.append((len(states) - run, run))
        if compute(text, min(text.rows, width)) is not None:
            text.next_extension(0.0)
    return passes


def test_a_fill_leaves_the_end_of_a_prompt_to_the_layers() -> None:
    text = new_text(fill=True)
    text.begin(round_of([1] * (2 * FILL_ROWS + EXACT_LAST), 0), 0.0)
    assert text.rows == 1, "a turn of filling"
    assert rows_run(text, 10) == [(FILL_ROWS, 0), (FILL_ROWS, 10), (0, EXACT_LAST - 10)]


def test_behind_a_prompt_a_fill_takes_one_row_of_a_pass_at_most() -> None:
    text, tokens = new_text(fill=True), [1] * (2 * FILL_ROWS + 2)
    text.begin(round_of(tokens[:1], 0), 0.0)
    finish(text)
    text.begin(round_of(tokens, 1), 0.0)
    assert text.rows == 1
    assert rows_run(text, 16) == [(FILL_ROWS, 0), (FILL_ROWS, 1)]


def test_what_decides_or_has_decided_has_a_rate_of_its_own() -> None:
    opening = Opening(b"", b"", 0, (), 0, handoff=b"x", rate=5, context_rate=2)
    text = HandoffSequence((), opening, CAP, CONTEXT)
    give_memory(text)
    states = tuple(state_of(position, position) for position in range(4))
    text.begin(Round(0, (0, 1, 2, 3), 1, states, decoded_from=(1,)), 0.0)
    assert [text.rate_at(position) for position in range(4)] == [2, 5, 2, 5]
    assert [text.id_at(position) for position in range(4)] == [0, 1, 2, 3]
    finish(text)
    text.begin(Round(4, (6, 7), 0, states[:2]), 0.0)
    assert [text.rate_at(position) for position in (4, 5)] == [2, 2], "nothing is asked for"
    assert [text.id_at(position) for position in (3, 4, 5)] == [3, 6, 7]


def test_times_and_passes_are_summed() -> None:
    text = new_text()
    text.begin(round_of([1, 2, 3, 4], 0), 10.0)
    assert text.work is not None
    text.work.started_s = 10.5
    compute(text, 3)
    committed = compute(text, 1)
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
def test_a_round_that_can_never_be_taken(round_: Round, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        new_text().check(round_)


def test_the_last_rounds_that_can_be_taken() -> None:
    new_text().check(Round(CONTEXT - 1, (1,), 0, (bytes(CAP),)))
    new_text().check(Round(CONTEXT - 2, (1,), 1, (b"",)))
