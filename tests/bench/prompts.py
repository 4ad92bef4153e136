"""Prompts for the language benchmarks, and sources of good, bad and hostile drafts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from isthmus.edge_agent.language.arms.verify import SpeculationStats
from isthmus.edge_agent.policy.averages import Average
from isthmus.edge_agent.policy.speculation import Acceptance, MeasuredLatency
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.language.processors import TokenChooser

FEW = (
    "Explain what a suspension bridge is.",
    "List five fruits.",
    "Write two lines about the sea.",
    "What is 12 + 30?",
)


def load_prompts(file: Path | None, tokenizer: Tokenizer, count: int, longest: int) -> list[tuple[int, ...]]:
    """The first `count` prompts of at most `longest` tokens, spread over the file, as token ids of a chat.

    Lines are JSON as in Spec-Bench ({"turns": [...]}), or {"prompt": ...}, or plain text; without a file FEW are used.
    """
    texts = list(FEW) if file is None else [text_of(line) for line in file.read_text().splitlines() if line.strip()]
    chats = [tuple(tokenizer.chat([Message("user", text)])) for text in texts]
    fitting = [ids for ids in chats if len(ids) <= longest]
    order = random.Random(0).sample(fitting, min(count, len(fitting)))
    return (order * -(-count // len(order)))[:count]


def text_of(line: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    record = json.loads(line)
    return str(record["turns"][0] if "turns" in record else record["prompt"])


class RandomDraft:
    """Drafts random tokens."""

    def __init__(self, vocab: int, seed: int) -> None:
        self._vocab, self._random = vocab, random.Random(seed)

    def next(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float]:
        return self._random.randrange(self._vocab), 0.9


class ScriptedDraft:
    """Drafts a given answer, always right, always wrong, or wrong at every n-th token."""

    def __init__(self, answer: Sequence[int], prompt_tokens: int, wrong_every: int, liar: int) -> None:
        """`wrong_every` 0: always right; 1: always wrong; n: every n-th token is `liar` instead."""
        self._answer, self._start, self._wrong_every, self._liar = answer, prompt_tokens, wrong_every, liar

    def next(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float] | None:
        index = len(text) - self._start
        if index >= len(self._answer):
            return None
        wrong = self._wrong_every and index % self._wrong_every == self._wrong_every - 1
        return (self._liar if wrong else self._answer[index]), 0.9


class Faithful(Acceptance):
    """An acceptance that never changes, so that bad drafts are sent too."""

    def observe(self, confidence: float, right: bool) -> None:
        pass


class Believed(Average):
    """A mean that no observation changes."""

    def observe(self, value: float) -> None:
        pass


class Unmeasured(MeasuredLatency):
    """A latency that no measurement changes."""

    def observe(self, seconds: float, tokens: int) -> None:
        pass


def sparing() -> SpeculationStats:
    """Statistics that learn the acceptance, with a cloud so slow that drafting pays off."""
    return SpeculationStats(Believed(0.015), Believed(0.15), Acceptance(), Unmeasured())


def stubborn() -> SpeculationStats:
    """Statistics with which drafting always seems to pay off, on any machine."""
    return SpeculationStats(Believed(0.002), Believed(0.03), Faithful(0.99), Unmeasured())
