from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.grammar import Grammars
from isthmus.models.language.processors import NEVER, STATE_BYTES, TokenChooser
from isthmus.models.language.sampling import choose
from isthmus.models.messages import MAX_LOGIT_BIASES, Grammar, Sampling
from tests.bench.tiny_llama import write_tiny_llama

VOCAB = 259
LOGITS_V = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32)
A = 3 + ord("a")
YES_NO = Grammar("regex", "ab+|cd")


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    return Grammars(Tokenizer.open(write_tiny_llama(tmp_path_factory.mktemp("bytes") / "tiny")))


def chooser(grammars: Grammars, sampling: Sampling, start: int = 2) -> TokenChooser:
    return TokenChooser(sampling, start, lambda grammar: grammars.state(grammar, [2]))


@given(
    text=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
    temperature=st.sampled_from([0.0, 0.7]),
    start=st.integers(0, 40),
)
def test_a_plain_choice_is_by_logits_and_position(text: list[int], temperature: float, start: int) -> None:
    sampling = Sampling(temperature, 0.9, 5)
    found = TokenChooser(sampling, start)
    assert found.choose(LOGITS_V, text) == choose(LOGITS_V, sampling, len(text))
    assert found.processed(LOGITS_V, text) is LOGITS_V and found.forced(text) is None and not found.state_bytes


@given(
    answer=st.lists(st.integers(0, 9), max_size=30),
    biases=st.dictionaries(st.integers(0, 12), st.floats(-100, 100, width=32), max_size=6),
    frequency=st.floats(-2, 2, width=32),
    presence=st.floats(-2, 2, width=32),
)
def test_biases_and_penalties_are_openais_over_the_answer_in_float32(
    answer: list[int], biases: dict[int, float], frequency: float, presence: float
) -> None:
    """mu[j] + bias[j] - c[j] * frequency - (c[j] > 0) * presence, each step rounded; the prompt does not count."""
    prompt, logits_V = [1, 1, 2, 3], LOGITS_V[:20]
    expected = []
    for id_, logit in enumerate(logits_V):
        value, count = np.float32(logit), answer.count(id_)
        if id_ in biases:
            value = np.float32(value + np.float32(biases[id_]))
        if count and (frequency or presence):
            value = np.float32(value - np.float32(np.float32(frequency) * np.float32(count)))
            value = np.float32(value - np.float32(presence))
        expected.append(value)
    sampling = Sampling(0.0, 1.0, 0, tuple(biases.items()), frequency, presence)
    found = TokenChooser(sampling, len(prompt)).processed(logits_V, [*prompt, *answer])
    assert np.array_equal(found, np.array(expected, np.float32))


def test_a_bias_excludes_a_token_or_makes_it_the_only_one() -> None:
    best = int(LOGITS_V.argmax())
    assert TokenChooser(Sampling(logit_bias=((best, -100.0),))).choose(LOGITS_V, [5]) != best
    assert TokenChooser(Sampling(1.0, logit_bias=((7, 100.0),))).choose(LOGITS_V, [5]) == 7


def test_logits_are_not_changed(grammars: Grammars) -> None:
    before_V = LOGITS_V.copy()
    one = chooser(grammars, Sampling(0.0, 1.0, 0, ((5, 3.0),), 1.0, 1.0, YES_NO))
    one.choose(LOGITS_V, [1, 2])
    assert np.array_equal(LOGITS_V, before_V)


def test_only_what_the_grammar_allows_is_chosen_whatever_the_bias(grammars: Grammars) -> None:
    sampling = Sampling(2.0, 1.0, 3, ((A + 10, 100.0),), grammar=YES_NO)
    one = chooser(grammars, sampling)
    for seed_text in range(20):
        assert one.choose(LOGITS_V, [seed_text, 1]) in (A, A + 2)
    assert one.choose(LOGITS_V, [1, 1, A]) == A + 1 == one.forced([1, 1, A]), "no logits are asked"
    assert one.forced([1, 1, A + 2, A + 3]) == 2, "the end of the answer"
    assert one.allows([1, 1], A) and not one.allows([1, 1], A + 1)
    assert one.allows([1, 1, A], A + 1) and not one.allows([1, 1, A], A)
    assert one.state_bytes == STATE_BYTES


def test_rows_that_stand_for_no_token_are_never_chosen_under_a_grammar(grammars: Grammars) -> None:
    larger_V = np.concatenate([LOGITS_V, np.full(5, 50, np.float32)])
    one = chooser(grammars, Sampling(grammar=YES_NO))
    assert one.choose(larger_V, [1, 1]) < VOCAB
    assert (one.processed(larger_V, [1, 1])[VOCAB:] == NEVER).all()


def test_a_confidence_is_told_of_what_can_follow(grammars: Grammars) -> None:
    judged_V = chooser(grammars, Sampling(grammar=YES_NO)).for_confidence(LOGITS_V, [1, 1])
    assert set(np.argsort(-judged_V)[:2]) == {A, A + 2}
    assert np.isfinite(judged_V).all() and judged_V.min() == pytest.approx(judged_V.max() - 30)


def test_an_answer_that_has_left_its_grammar_is_refused(grammars: Grammars) -> None:
    with pytest.raises(InvalidInput, match="token 1 of the answer is not what its grammar allows"):
        chooser(grammars, Sampling(grammar=YES_NO)).choose(LOGITS_V, [1, 1, A, A])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Sampling(frequency_penalty=2.1), "frequency_penalty is 2.1, expected -2 to 2"),
        (lambda: Sampling(presence_penalty=float("nan")), "presence_penalty is nan"),
        (lambda: Sampling(logit_bias=((1, 101.0),)), "logit_bias of token 1 is 101.0, expected -100 to 100"),
        (lambda: Sampling(logit_bias=((-1, 1.0),)), "logit_bias names -1"),
        (lambda: Sampling(logit_bias=((1, 1.0), (1, 2.0))), "names a token twice"),
        (lambda: Sampling(logit_bias=((1, 2.0, 3.0),)), "expected pairs"),  # type: ignore[arg-type]
        (lambda: Sampling(logit_bias=tuple((i, 1.0) for i in range(MAX_LOGIT_BIASES + 1))), "at most 300"),
        (lambda: Sampling(grammar="a"), "grammar is str, expected a Grammar"),  # type: ignore[arg-type]
    ],
)
def test_values_out_of_range_are_no_sampling(make: Callable[[], Sampling], expected: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(expected)):
        make()


def test_what_has_to_be_applied_has_a_name() -> None:
    assert Sampling(0.7).processors == () and not Sampling(logit_bias=((1, 1.0),)).reads_answer
    assert Sampling(presence_penalty=1).processors == ("penalties",)
    assert Sampling(0.0, 1.0, 0, ((1, 1.0),), 1.0, 0.0, YES_NO).processors == ("logit_bias", "penalties", "regex")
