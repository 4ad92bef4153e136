from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.drafts import (
    NGRAM_CONFIDENCE,
    LookupDraft,
    ModelDraft,
    PredictionDraft,
    probability,
    shared_length,
)
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.processors import TokenChooser
from isthmus.models.language.sampling import choose
from isthmus.models.messages import GREEDY, Sampling
from tests.bench.tiny_llama import write_tiny_llama

CONTEXT = 64
PLAIN = TokenChooser(GREEDY)

texts = st.lists(st.integers(0, 3), max_size=24)  # few tokens, so that they repeat themselves


def lookup(text: list[int]) -> tuple[int, float] | None:
    return LookupDraft().next(text, PLAIN)


def by_hand(text: list[int]) -> tuple[int, float] | None:
    """Prompt lookup, written down without an index."""
    for length in (4, 3, 2):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                return text[start + length], NGRAM_CONFIDENCE[length]
    return None


def test_the_longest_end_that_came_before_wins_and_of_those_the_last() -> None:
    assert lookup([1, 2, 3, 4, 9, 7, 3, 4, 8, 1, 2, 3, 4]) == (9, NGRAM_CONFIDENCE[4])
    assert lookup([7, 3, 4, 8, 5, 3, 4, 6, 0, 3, 4]) == (6, NGRAM_CONFIDENCE[2])
    assert lookup([1, 2, 3, 9, 0, 2, 3, 8, 1, 2, 3]) == (9, NGRAM_CONFIDENCE[3])


@pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 1]])
def test_no_idea_about_what_did_not_come_before(text: list[int]) -> None:
    assert lookup(text) is None


@given(texts)
def test_it_is_prompt_lookup(text: list[int]) -> None:
    assert lookup(text) == by_hand(text)


@given(texts, st.lists(st.tuples(st.integers(0, 30), texts), max_size=6))
def test_a_text_that_grows_or_goes_another_way_is_as_if_read_afresh(
    text: list[int], changes: list[tuple[int, list[int]]]
) -> None:
    draft = LookupDraft()
    for kept, more in [(0, text), *changes]:
        text = [*text[:kept], *more]
        assert draft.next(text, PLAIN) == by_hand(text)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> OnnxDecoder:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama", scale=0.3)
    return OnnxDecoder(Checkpoint.open(folder), CONTEXT, threads=1)


def afresh(decoder: OnnxDecoder, text: list[int], sampling: Sampling) -> tuple[int, float]:
    decoder.truncate(0)
    logits_V = decoder.extend(text)
    token = choose(logits_V, sampling, len(text))
    return token, probability(logits_V, token)


def test_a_model_drafts_as_if_it_ran_each_text_from_its_beginning(decoder: OnnxDecoder) -> None:
    """Texts that grow, are cut, branch off, come twice, or begin differently."""
    rng = np.random.default_rng(0)
    text, seen = [1], []
    for step in range(60):
        kept = int(rng.choice([len(text), len(text), rng.integers(0, len(text) + 1), 0]))
        text = [*text[:kept], *rng.integers(0, 259, rng.integers(0 if kept else 1, 5)).tolist()][:CONTEXT]
        seen.append((list(text), GREEDY if step % 3 else Sampling(1.0, 0.9, step)))
    expected = [afresh(decoder, *one) for one in seen]
    decoder.truncate(0)
    draft = ModelDraft(decoder)
    for (text, sampling), (token, confidence) in zip(seen, expected, strict=True):
        found = draft.next(text, TokenChooser(sampling))
        assert found is not None
        assert found == (token, pytest.approx(confidence, rel=1e-3))
        assert decoder.length == len(text)


def test_what_was_run_is_not_run_again(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder.truncate(0)
    fed: list[list[int]] = []
    extend = decoder.extend
    monkeypatch.setattr(decoder, "extend", lambda ids: fed.append(list(ids)) or extend(ids))
    draft = ModelDraft(decoder)
    for text in ([5, 6, 7], [5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7, 4], [5, 6], [9]):
        draft.next(text, PLAIN)
    assert fed == [[5, 6, 7], [8, 9], [4], [6], [9]]


def test_beyond_its_context_a_model_has_no_idea(decoder: OnnxDecoder) -> None:
    decoder.truncate(0)
    draft = ModelDraft(decoder)
    assert draft.next([5] * CONTEXT, PLAIN) is not None
    assert draft.next([5] * (CONTEXT + 1), PLAIN) is None
    with pytest.raises(InvalidInput):
        draft.logits([5] * (CONTEXT + 1))


def test_a_text_that_could_not_be_run_leaves_nothing_behind(decoder: OnnxDecoder) -> None:
    expected = afresh(decoder, [5, 6], GREEDY)
    decoder.truncate(0)
    draft = ModelDraft(decoder)
    draft.next([5, 6, 7], PLAIN)
    with pytest.raises(InvalidInput):
        draft.next([5, 6, 1000], PLAIN)
    found = draft.next([5, 6], PLAIN)
    assert found == (expected[0], pytest.approx(expected[1], rel=1e-3))


def test_probability_is_the_softmax_of_one_token() -> None:
    logits_V = np.array([1.0, 3.0, -2.0], np.float32)
    shares = [probability(logits_V, token) for token in range(3)]
    assert shares == pytest.approx(np.exp(logits_V) / np.exp(logits_V).sum(), rel=1e-6)


@given(texts, texts)
def test_shared_length(one: list[int], other: list[int]) -> None:
    length = shared_length(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


PROMPT = [90, 91, 92]


def predicted(prediction: list[int], answer: list[int]) -> int | None:
    found = PredictionDraft(prediction, len(PROMPT)).next([*PROMPT, *answer], PLAIN)
    return found[0] if found else None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([], 1),
        ([1, 2, 3], 4),
        ([1, 2, 3, 4, 5, 6, 7, 8], None),  # its end
        ([1, 2, 50], None),  # another token
        ([1, 2, 50, 3], None),
        ([1, 2, 50, 3, 4], 5),  # inserted
        ([1, 50, 3, 4], 5),  # replaced
        ([1, 2, 3, 6, 7], 8),  # left out
        ([1, 2, 3, 4, 5, 6, 50, 2, 3], 4),  # back to an earlier place
    ],
)
def test_a_prediction_goes_on_where_the_answer_is_in_it(answer: list[int], expected: int | None) -> None:
    assert predicted([1, 2, 3, 4, 5, 6, 7, 8], answer) == expected


def test_of_several_places_the_next_one_counts() -> None:
    repeated = [7, 8, 1, 7, 8, 2, 7, 8, 3]
    assert predicted(repeated, [7, 8, 1, 50, 7, 8]) == 2
    assert predicted(repeated, [7, 8, 1, 7, 8, 2, 50, 7, 8]) == 3


def test_without_a_place_in_the_prediction_the_text_itself_is_looked_up() -> None:
    draft = PredictionDraft([1, 2], len(PROMPT))
    assert draft.next([*PROMPT, 5, 6, 7, 5, 6], PLAIN) == (7, NGRAM_CONFIDENCE[2])


@given(texts, st.lists(st.integers(0, 3), max_size=10))
def test_a_prediction_does_not_depend_on_what_was_drafted_before(prediction: list[int], answer: list[int]) -> None:
    used = PredictionDraft(prediction, 0)
    for text in (answer[:5], [*answer[:3], 9, 9], answer):
        assert used.next(text, PLAIN) == PredictionDraft(prediction, 0).next(text, PLAIN)


def test_a_prediction_that_the_grammar_does_not_allow_is_no_draft() -> None:
    class Refusing(TokenChooser):
        def allows(self, text: Sequence[int], token: int) -> bool:
            return token != 2

    draft = PredictionDraft([1, 2, 3], len(PROMPT))
    assert draft.next(PROMPT, Refusing(GREEDY)) == PredictionDraft([1, 2, 3], len(PROMPT)).next(PROMPT, PLAIN)
    assert draft.next([*PROMPT, 1], Refusing(GREEDY)) is None
    assert draft.next([*PROMPT, 1], PLAIN) is not None
