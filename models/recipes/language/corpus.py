"""Training texts: chats that the model generates itself, and entries of dictionaries from Debian packages.

No data set is needed: questions are sampled from the model's chat template, or made from a dictionary's entry. Source:
Xu et al., "Magpie" (2024), for questions sampled from the template.
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.language.drafts import shared_length
from isthmus.models.recipes.common import debian
from isthmus.models.recipes.language.llama import LayerCache, Llama

CHUNKS, CHATS = 60, 64  # files, and chats of a file
QUESTION_TOKENS, ANSWER_TOKENS = 48, 128
ENTRY_TOKENS = 160
GREEDY_SHARE = 0.75  # of answers; the others are sampled
TEMPERATURE = 0.8
OWN_SHARE = 0.4  # of questions that the model samples itself
RUNNING_TEXTS = 2000  # entries
MIN_CHARACTERS = 200  # of an entry
PART_SEQUENCES = 250  # sequences of one file of teacher outputs
LONG_TEXTS, LONG_TOKENS = 480, 640  # sequences of each kind, and tokens of one

ABOUT = (
    "Summarize the following text in one or two sentences:\n\n{text}",
    "Explain this in simple words:\n\n{text}",
    "What is {title}?",
    "Tell me about {title}.",
    "Write a short story about {title}.",
    "Read the text and answer: what is {title}?\n\n{text}",
    "Continue this text:\n\n{text}",
    "Translate this into French: {title} is important.",
    "List five facts about {title}.",
    "Write an email to a colleague about {title}.",
    "{first} has {a} apples. {second} gives {first} {b} more, and {first} eats {c}. How many apples are left?",
    "A box holds {a} pens, and a pen costs {b} dollars. What do {c} boxes cost? Think step by step.",
    "Write a Python function that has to do with {title}.",
    "What are the advantages and disadvantages of {title}?",
)
NAMES = ("Anna", "Ben", "Chris", "Dora", "Emil", "Fay")


@dataclass(frozen=True)
class Entry:
    """An entry of a dictionary."""

    title: str
    text: str


def entries(folder: Path) -> list[Entry]:
    """Entries of FOLDOC and the Jargon File, fetched into `folder`. Raises InvalidInput when they cannot be fetched."""
    loaded = []
    for package, file in (("dict-foldoc", "foldoc.dict.dz"), ("dict-jargon", "jargon.dict.dz")):
        (path,) = debian.fetch(package, folder).rglob(file)
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        for block in re.split(r"\n(?=\S)", text):
            title, _, body = block.partition("\n")
            body = re.sub(r"[{}]", "", re.sub(r"\s+", " ", body)).strip()
            if len(body) >= MIN_CHARACTERS and len(title) < 60:
                loaded.append(Entry(title.strip(), body))
    if not loaded:
        raise InvalidInput(f"the dictionaries in {folder} contain no entries")
    return loaded


@dataclass(frozen=True)
class Corpus:
    """Concatenated sequences: token ids, the end of each, and the start of each answer (the end if there is none)."""

    ids_N: NDArray[np.uint16]
    ends_S: NDArray[np.int64]
    answers_S: NDArray[np.int64]

    def sequences(self) -> list[list[int]]:
        """The token ids of each sequence."""
        return [part.tolist() for part in np.split(self.ids_N, self.ends_S[:-1])]

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".part.npz")
        np.savez(partial, ids=self.ids_N, ends=self.ends_S, answers=self.answers_S)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        with np.load(path) as file:
            return cls(file["ids"], file["ends"], file["answers"])

    @classmethod
    def from_sequences(cls, sequences: Sequence[tuple[Sequence[int], int]]) -> Corpus:
        """`sequences`: token ids and the index at which the answer begins."""
        lengths = [len(ids) for ids, _ in sequences]
        ends_S = np.cumsum(lengths)
        starts_S = ends_S - lengths
        answers_S = starts_S + np.array([answer for _, answer in sequences])
        return cls(np.concatenate([np.asarray(ids, np.uint16) for ids, _ in sequences]), ends_S, answers_S)


def running_texts(entries: Sequence[Entry], tokenizer: Tokenizer, seed: int) -> Corpus:
    """Entries as running text, one sequence each."""
    chosen = random.Random(seed).sample(list(entries), min(RUNNING_TEXTS, len(entries)))
    ids = [tokenizer.encode(f"{entry.title}\n{entry.text}")[: 2 * ENTRY_TOKENS] for entry in chosen]
    return Corpus.from_sequences([(each, len(each)) for each in ids])


def long_texts(sequences: Iterable[Sequence[int]]) -> Corpus:
    """Concatenate sequences and cut them into at most LONG_TEXTS of LONG_TOKENS; the rest is dropped."""
    ids = [id_ for sequence in sequences for id_ in sequence][: LONG_TEXTS * LONG_TOKENS]
    starts = range(0, len(ids) - LONG_TOKENS + 1, LONG_TOKENS)
    return Corpus.from_sequences([(ids[start : start + LONG_TOKENS], LONG_TOKENS) for start in starts])


def shuffled(entries: Sequence[Entry], tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    """Token ids of all entries in random order, each followed by a blank line."""
    chosen = random.Random(seed).sample(list(entries), len(entries))
    return [tokenizer.encode(f"{entry.title}\n{entry.text}\n\n") for entry in chosen]


def split_parts(corpus: Corpus) -> list[Corpus]:
    """The same sequences, without answers, in parts of PART_SEQUENCES."""
    sequences = [(ids, len(ids)) for ids in corpus.sequences()]
    return [
        Corpus.from_sequences(sequences[start : start + PART_SEQUENCES])
        for start in range(0, len(sequences), PART_SEQUENCES)
    ]


def chats(folder: Path, model: Llama, tokenizer: Tokenizer, entries: Sequence[Entry], seed: int) -> list[Corpus]:
    """CHUNKS files of chats in `folder`, generated where missing. Each is seeded with `seed` and its number."""
    loaded = []
    for number in track(range(CHUNKS), "self-generated chats"):
        path = folder / f"chats-{number:03}.npz"
        if not path.exists():
            make_chats(model, tokenizer, entries, (seed << 16) + number).save(path)
        loaded.append(Corpus.load(path))
    return loaded


def make_chats(model: Llama, tokenizer: Tokenizer, entries: Sequence[Entry], seed: int) -> Corpus:
    """CHATS chats: questions of the model itself or about entries, and the model's answers."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    own = round(OWN_SHARE * CHATS)
    opening, other = (tokenizer.chat([Message("user", word)]) for word in ("Hello", "Why"))
    opening = opening[: shared_length(opening, other)]
    sampled = generate(model, [opening] * own, QUESTION_TOKENS, tokenizer.eos_ids, generator, [1.0] * own)
    questions = [tokenizer.decode(ids).strip() or "Hello" for ids in sampled]
    questions += [question_about(chance, chance.choice(entries), tokenizer) for _ in range(CHATS - own)]
    prompts = [tokenizer.chat([Message("user", question)]) for question in questions]
    temperatures = [0.0 if chance.random() < GREEDY_SHARE else TEMPERATURE for _ in prompts]
    answers = generate(model, prompts, ANSWER_TOKENS, tokenizer.eos_ids, generator, temperatures)
    return Corpus.from_sequences(
        [([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
    )


def question_about(chance: random.Random, entry: Entry, tokenizer: Tokenizer) -> str:
    """A random question about an entry."""
    first, second = chance.sample(NAMES, 2)
    text = tokenizer.decode(tokenizer.encode(entry.text)[:ENTRY_TOKENS])
    a, b, c = (chance.randint(2, 20) for _ in range(3))
    return chance.choice(ABOUT).format(title=entry.title, text=text, first=first, second=second, a=a, b=b, c=c)


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    eos_ids: frozenset[int],
    generator: torch.Generator,
    temperatures: Sequence[float],
) -> list[list[int]]:
    """Continue each prompt by at most `tokens` ids, up to and including the first that ends a text."""
    longest = max(map(len, prompts))
    starts_B = torch.tensor([longest - len(prompt) for prompt in prompts])
    ids_BT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    temperature_B1 = torch.tensor(temperatures)[:, None]
    ends = torch.tensor(sorted(eos_ids))
    caches: list[LayerCache | None] = [None] * len(model.layers)
    generated: list[Tensor] = []
    ended_B = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(tokens):
        x_BTH = model.embed(ids_BT)
        for index, layer in enumerate(model.layers):
            x_BTH, caches[index] = layer(x_BTH, caches[index], starts_B)
        logits_BV = model.logits(x_BTH[:, -1]).float()
        noise_BV = -torch.log(-torch.log(torch.rand(logits_BV.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
        ids_B = (logits_BV + temperature_B1 * noise_BV).argmax(1)
        generated.append(ids_B)
        ended_B |= torch.isin(ids_B, ends)
        if ended_B.all():
            break
        ids_BT = ids_B[:, None]
    return [truncate_at_end(ids, eos_ids) for ids in torch.stack(generated, 1).tolist()]


def truncate_at_end(ids: list[int], eos_ids: frozenset[int]) -> list[int]:
    """The ids up to and including the first that ends a text."""
    end = next((index for index, id_ in enumerate(ids) if id_ in eos_ids), len(ids) - 1)
    return ids[: end + 1]
