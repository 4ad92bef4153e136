"""Prompts with the answers of both models of a pair, collected once and kept in a file.

prompt --device's model--> greedy answer, features at each check
       --cloud's model---> greedy answer                        -> acceptable or not
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.language.packing import Floats
from isthmus.models.language.router.answers import CUT, ENDED, RUNNING, AnswerFeatures, is_due
from isthmus.models.recipes.common.json_lines import read_lines
from isthmus.models.recipes.language.answer_quality import is_acceptable
from isthmus.models.recipes.language.prompts import EXPECTED, LONGEST_PROMPT, first_turn, prompt_records
from isthmus.models.recipes.language.router_answers import Cloud

AT_ONCE = 8  # prompts whose answers are saved together

Logits = Callable[[Sequence[int]], Floats]


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """A model's answer. checks: features at each check, of a device's answer alone. generated: its tokens."""

    text: str
    generated: int
    checks: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class AnsweredPrompt:
    """A prompt with both answers, and whether the device's is no worse."""

    prompt: str
    device: WholeAnswer
    cloud: WholeAnswer
    acceptable: bool


def device_answer(logits: Logits, tokenizer: Tokenizer, prompt: Sequence[int], most: int) -> WholeAnswer:
    """A greedy answer of at most so many tokens with what the device would know of it. `logits`: after a text."""
    text, features, checks = list(prompt), AnswerFeatures(len(prompt)), []
    state = RUNNING
    while state == RUNNING:
        logits_V = logits(text)
        token = int(logits_V.argmax())
        features.add(logits_V, token)
        text.append(token)
        state = ENDED if token in tokenizer.eos_ids else CUT if len(features) == most else RUNNING
        if is_due(len(features), state):
            checks.append(tuple(map(float, features.features(state))))
    answer = text[len(prompt) :]
    return WholeAnswer(
        tokenizer.decode([id_ for id_ in answer if id_ not in tokenizer.eos_ids]), len(answer), tuple(checks)
    )


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with its right answers, of which there may be none."""

    prompt: str
    references: tuple[str, ...] = ()


def read_questions(file: Path) -> list[Question]:
    """The questions of a file, each once: JSON lines with "turns" and perhaps "reference", or plain lines.

    "reference" is a right answer or a list of them. Raises InvalidInput.
    """
    questions: dict[str, Question] = {}
    for where, record in prompt_records(file):
        try:
            found = record.get("reference") or ()
            references = (found,) if isinstance(found, str) else tuple(map(str, found))
        except TypeError as error:
            raise InvalidInput(f"{where}: {EXPECTED}, and a reference or a list of them: {error}") from error
        questions[first_turn(record)] = Question(first_turn(record), references)
    return list(questions.values())


def answered_prompts(
    file: Path, logits: Logits, tokenizer: Tokenizer, cloud: Cloud, questions: Sequence[Question], most: int
) -> Iterator[AnsweredPrompt]:
    """Both answers to each question, of those in `file` or made now and added to it.

    Questions that are too long are left out. Raises IsthmusError.
    """
    known = read_answered(file)
    missing = [each for each in questions if each.prompt not in known and fits(each, tokenizer, cloud.tokenizer)]
    for start in range(0, len(missing), AT_ONCE):
        batch = missing[start : start + AT_ONCE]
        chats = [tuple(cloud.tokenizer.chat([Message("user", each.prompt)])) for each in batch]
        for question, ids in zip(batch, cloud.answers(chats), strict=True):
            own = tokenizer.chat([Message("user", question.prompt)])
            device, ends = device_answer(logits, tokenizer, own, most), cloud.tokenizer.eos_ids
            whole = WholeAnswer(cloud.tokenizer.decode([id_ for id_ in ids if id_ not in ends]), len(ids))
            acceptable = is_acceptable(device.text, whole.text, question.references)
            known[question.prompt] = AnsweredPrompt(question.prompt, device, whole, acceptable)
            append(file, known[question.prompt])
    yield from (known[each.prompt] for each in questions if each.prompt in known)


def fits(question: Question, *tokenizers: Tokenizer) -> bool:
    """Whether no tokenizer makes more than LONGEST_PROMPT tokens of it."""
    return all(len(each.chat([Message("user", question.prompt)])) <= LONGEST_PROMPT for each in tokenizers)


def append(file: Path, made: AnsweredPrompt) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(made)) + "\n")


def read_answered(file: Path) -> dict[str, AnsweredPrompt]:
    """Prompts by their text; an interrupted run may leave half a line. Raises InvalidInput for another file."""
    try:
        found = [answered_from(line) for line in read_lines(file)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(f"{file}: not the answers of a router recipe: {error}") from error
    return {each.prompt: each for each in found}


def answered_from(content: dict[str, Any]) -> AnsweredPrompt:
    device, cloud = (
        WholeAnswer(each["text"], each["generated"], tuple(map(tuple, each["checks"])))
        for each in (content["device"], content["cloud"])
    )
    return AnsweredPrompt(content["prompt"], device, cloud, bool(content["acceptable"]))
