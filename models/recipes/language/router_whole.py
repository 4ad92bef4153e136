"""The part of a router bundle for whole answers: questions in, heads, levels and scores out. Any two vocabularies."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.models.bundle.manifest import Interval
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.drafts import ModelDraft
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.router.manifest import OffloadLevel
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language.answered import AnsweredPrompt, answered_prompts, read_questions
from isthmus.models.recipes.language.answers import answer_scores, train_answers
from isthmus.models.recipes.language.prompts import ANSWER_TOKENS, LONGEST_PROMPT
from isthmus.models.recipes.language.router_answers import Cloud

MIN_QUESTIONS = 40
VERIFIER = "answers.safetensors"


@dataclass(frozen=True)
class RouterPart:
    """A part of a router bundle, of tokens or of whole answers.

    fields: of the manifest. file, tensors: what it adds to the bundle. lines: what it promises. seconds, data: what it
    took and was made from.
    """

    fields: dict[str, Any]
    file: str
    tensors: dict[str, NDArray[Any]]
    scores: dict[str, Interval]
    lines: list[str]
    seconds: float
    data: str


def whole_part(run: Run, cloud: Cloud, checkpoint: Checkpoint, bits: int, file: Path) -> RouterPart:
    """Both models answer the questions of a file; half of them train, the others certify. Raises IsthmusError."""
    origin = {"device": checkpoint.fingerprint.hex(), "bits": str(bits), "cloud": str(cloud.identity)}
    started = Run(run.folder / "whole", run.seed, apart=True).of(recipe="router whole answers", **origin)
    answered = collect(started, cloud, checkpoint, bits, file)
    order = np.random.default_rng(run.seed).permutation(len(answered)).tolist()
    training, test = ([answered[index] for index in part] for part in np.split(order, [len(order) // 2]))
    trained = train_answers(training, test, run.seed)
    acceptable_P = np.array([each.acceptable for each in test])
    accepted_P = answer_scores(trained.verifier, test) >= 0.5
    scores = {"test answers acceptable": interval(acceptable_P)}
    if accepted_P.any():
        scores["test answers acceptable of those scored 0.5"] = interval(acceptable_P[accepted_P])
    levels = {"answer_levels": trained.answer_levels, "query_levels": trained.query_levels}
    return RouterPart(
        {"verifier": VERIFIER, **{name: [each.model_dump() for each in found] for name, found in levels.items()}},
        VERIFIER,
        trained.verifier.tensors(),
        scores,
        [line for name, found in levels.items() for line in described(name.partition("_")[0], found)],
        started.seconds(),
        f"answers of both models to {len(answered)} questions, {len(training)} for training",
    )


def collect(run: Run, cloud: Cloud, checkpoint: Checkpoint, bits: int, file: Path) -> list[AnsweredPrompt]:
    """Both answers to each question that fits; a rerun continues. Raises InvalidInput where there are too few."""
    began_s = time.monotonic()
    decoder = OnnxDecoder(checkpoint, LONGEST_PROMPT + ANSWER_TOKENS, bits, torch.get_num_threads())
    cached, logits = run.folder / "answered.jsonl", ModelDraft(decoder).logits
    questions = read_questions(file)
    answered = list(answered_prompts(cached, logits, checkpoint.tokenizer, cloud, questions, ANSWER_TOKENS))
    run.record("answered", time.monotonic() - began_s)
    if len(answered) < MIN_QUESTIONS:
        raise InvalidInput(f"{file} has {len(answered)} prompts that fit, at least {MIN_QUESTIONS} are needed")
    return answered


def described(kind: str, levels: list[OffloadLevel]) -> list[str]:
    """The levels of whole answers, one line each, without those that promise no more than the one before."""
    lines, best = [], 1.0
    for level in levels:
        if level.certificate.epsilon < best:
            best = level.certificate.epsilon
            lines.append(
                f"{kind} from score {level.likely:.3f}: the cloud gives {level.asked:.0%} of the answers,"
                f" {1 - best:.1%} certified acceptable"
            )
    return lines
