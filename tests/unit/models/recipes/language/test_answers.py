"""What scores whole answers: learned from likelihoods, certified over prompts; and what counts as a good answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isthmus.models.errors import InvalidInput
from isthmus.models.language.router.answers import ANSWER_FEATURES
from isthmus.models.recipes.language.answer_quality import is_acceptable, is_right, similarity
from isthmus.models.recipes.language.answered import (
    AnsweredPrompt,
    Question,
    WholeAnswer,
    read_answered,
    read_questions,
)
from isthmus.models.recipes.language.answers import answer_scores, query_scores, train_answers


def planted(count: int, seed: int) -> list[AnsweredPrompt]:
    """Answers whose mean log-probability says mostly whether they will do; their first token says less."""
    generator, made = np.random.default_rng(seed), []
    for index in range(count):
        good = generator.random() < 0.6
        checks = generator.standard_normal((generator.integers(1, 5), ANSWER_FEATURES))
        checks[:, 4] += 2.5 * good
        checks[:, 0] = checks[0, 0] + 0.7 * good
        device = WholeAnswer("device", 9, tuple(map(tuple, checks)))
        made.append(AnsweredPrompt(f"prompt {index} {seed}", device, WholeAnswer("cloud", 9), bool(good)))
    return made


def test_scores_are_learned_and_levels_hold_on_other_prompts() -> None:
    trained, fresh = train_answers(planted(400, 1), planted(400, 2), 0), planted(4000, 3)
    acceptable_P = np.array([each.acceptable for each in fresh])
    for levels, score in ((trained.answer_levels, answer_scores), (trained.query_levels, query_scores)):
        scores_P = score(trained.verifier, fresh)
        assert scores_P[acceptable_P].mean() > scores_P[~acceptable_P].mean()
        assert levels[0].likely == 0 and levels[0].asked == 0
        for level in levels:
            accepted_P = scores_P >= level.likely
            assert (accepted_P & ~acceptable_P).mean() <= level.certificate.epsilon
            assert (~accepted_P).mean() == pytest.approx(level.asked, abs=0.08)
    cheapest = [
        min(level.asked for level in levels if level.certificate.epsilon <= 0.1)
        for levels in (trained.answer_levels, trained.query_levels)
    ]
    assert cheapest[0] < cheapest[1], "the answer says more than its first token"


def test_answers_that_are_all_alike_teach_nothing() -> None:
    good = [each for each in planted(100, 1) if each.acceptable]
    with pytest.raises(InvalidInput, match="answers are equally good: there is nothing to learn"):
        train_answers(good, good, 0)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("The answer is 42.", "42", True),
        ("42 + 1 = 43", "42", False),
        ("It costs $1,000 in total", "He pays 400.\n#### 1000", True),
        ("It is 3.5", "3.5", True),
        ("Her lamp is BLUE!", "blue", True),
        ("It is bluer", "blue", False),
        ("", "blue", False),
        ("river stone cloud", "stone cloud", True),
    ],
)
def test_right_answers(answer: str, reference: str, right: bool) -> None:
    assert is_right(answer, [reference]) == right and is_right(answer, ["never this", reference]) == right


def test_an_answer_that_is_no_worse_will_do() -> None:
    assert (
        is_acceptable("42", "41", ["42"]) and is_acceptable("1", "2", ["42"]) and not is_acceptable("1", "42", ["42"])
    )
    assert is_acceptable("a b c", "A, b: c.", []) and not is_acceptable("a b c", "d e f", [])
    assert similarity("a b", "b c") == 0.5 and similarity("", "") == 1 and similarity("", "a") == 0


def test_questions_are_read_and_what_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "questions"
    file.write_text('plain\n\n{"turns": ["why?"], "reference": ["so", 7]}\nplain\n')
    assert read_questions(file) == [Question("plain"), Question("why?", ("so", "7"))]
    file.write_text('{"turns": ["6 * 7?"], "reference": "42"}\n')
    assert read_questions(file) == [Question("6 * 7?", ("42",))]
    for broken in ("{}", '{"turns": []}', "{"):
        file.write_text(broken)
        with pytest.raises(InvalidInput, match="expected plain prompts, or lines of JSON with turns"):
            read_questions(file)
    file.write_text('{"prompt": "p"}\n')
    with pytest.raises(InvalidInput, match="not the answers of a router recipe"):
        read_answered(file)
