"""Test prompts, which nothing is trained on, and the full model's greedy answers to them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.recipes.language.corpus import Corpus, generate
from isthmus.models.recipes.language.llama import Llama

ANSWER_TOKENS = 96
LONGEST_PROMPT = 512  # tokens; longer ones are left out
BATCH_PROMPTS = 32
EXPECTED = "expected plain prompts, or lines of JSON with turns"


def load_prompts(file: Path, tokenizer: Tokenizer, every: int = 1) -> list[list[int]]:
    """Token ids of a file's prompts, sorted by length, every `every`-th of them.

    The file has Spec-Bench's format: JSON lines with "turns". Raises InvalidInput when it contains no prompt.
    """
    try:
        turns = [json.loads(line)["turns"][0] for line in file.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InvalidInput(f"{file}: expected lines of JSON with turns: {error!r}") from error
    prompts = sorted((tokenizer.chat([Message("user", str(turn))]) for turn in turns), key=len)
    prompts = [prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT][::every]
    if not prompts:
        raise InvalidInput(f"{file} contains no prompt of at most {LONGEST_PROMPT} tokens")
    return prompts


def prompt_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place of each prompt of a file, and its record, which has "turns": a line of JSON, or a plain prompt.

    Raises InvalidInput.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{file}: not a text file in UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line) if line.lstrip().startswith("{") else {"turns": [line]}
            first_turn(record)
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise InvalidInput(f"{where}: {EXPECTED}: {error!r}") from error
        yield where, record


def first_turn(record: dict[str, Any]) -> str:
    """The prompt of a record."""
    return str(record["turns"][0])


def greedy_answers(
    folder: Path, model: Llama, eos_ids: frozenset[int], prompts: Sequence[Sequence[int]]
) -> tuple[str, Corpus]:
    """Prompts with the model's greedy answers, cached in `folder`, and the name that they are cached under."""
    name = f"answers-{zlib.crc32(json.dumps(prompts).encode()):08x}"
    path = folder / f"{name}.npz"
    if path.exists():
        return name, Corpus.load(path)
    sequences, generator = [], torch.Generator().manual_seed(0)
    for start in track(range(0, len(prompts), BATCH_PROMPTS), "answers to test prompts"):
        batch = prompts[start : start + BATCH_PROMPTS]
        answers = generate(model, batch, ANSWER_TOKENS, eos_ids, generator, [0.0] * len(batch))
        sequences += [([*prompt, *answer], len(prompt)) for prompt, answer in zip(batch, answers, strict=True)]
    corpus = Corpus.from_sequences(sequences)
    corpus.save(path)
    return name, corpus
