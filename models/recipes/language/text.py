"""Text that exits are distilled on: chats that the model has with itself, and entries of dictionaries in packages.

No data set: users' questions are the model's own, sampled from its chat template, or ask something about an entry.
Source: Xu et al., "Magpie" (2024), for questions sampled from the template.
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
from isthmus.models.recipes.language.llama import Llama, Past

CHUNKS, CHATS = 60, 64  # batches of so many chats
QUESTION_TOKENS, ANSWER_TOKENS = 48, 128
ENTRY_TOKENS = 160
GREEDY_SHARE = 0.75  # of answers; the others are sampled
TEMPERATURE = 0.8
OWN_SHARE = 0.4  # of questions that the model makes up
WANTED_ENTRIES = 2000
LEAST_CHARACTERS = 200  # of an entry
PART = 250  # entries that are run at once
LONG_TEXTS, LONG_TOKENS = 480, 640  # of each kind

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
    """Of a dictionary."""

    title: str
    text: str


def entries(folder: Path) -> list[Entry]:
    """Of the Free On-line Dictionary of Computing and the Jargon File. Raises InvalidInput where they cannot be had."""
    found = []
    for package, file in (("dict-foldoc", "foldoc.dict.dz"), ("dict-jargon", "jargon.dict.dz")):
        (path,) = debian.fetch(package, folder).rglob(file)
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        for block in re.split(r"\n(?=\S)", text):
            title, _, body = block.partition("\n")
            body = re.sub(r"[{}]", "", re.sub(r"\s+", " ", body)).strip()
            if len(body) >= LEAST_CHARACTERS and len(title) < 60:
                found.append(Entry(title.strip(), body))
    if not found:
        raise InvalidInput(f"the dictionaries below {folder} hold no entries")
    return found


@dataclass(frozen=True)
class Texts:
    """Sequences one after another: their token ids, where each ends, and where its answer begins (its end: nowhere)."""

    ids_N: NDArray[np.uint16]
    ends_S: NDArray[np.int64]
    answers_S: NDArray[np.int64]

    def sequences(self) -> list[list[int]]:
        """The token ids of each."""
        return [part.tolist() for part in np.split(self.ids_N, self.ends_S[:-1])]

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".part.npz")
        np.savez(partial, ids=self.ids_N, ends=self.ends_S, answers=self.answers_S)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Texts:
        with np.load(path) as file:
            return cls(file["ids"], file["ends"], file["answers"])

    @classmethod
    def of(cls, sequences: Sequence[tuple[Sequence[int], int]]) -> Texts:
        """Of token ids and the index at which the answer begins."""
        lengths = [len(ids) for ids, _ in sequences]
        ends_S = np.cumsum(lengths)
        starts_S = ends_S - lengths
        answers_S = starts_S + np.array([answer for _, answer in sequences])
        return cls(np.concatenate([np.asarray(ids, np.uint16) for ids, _ in sequences]), ends_S, answers_S)


def plain_texts(entries: Sequence[Entry], tokenizer: Tokenizer, seed: int) -> Texts:
    """Entries as running text, a sequence each."""
    chosen = random.Random(seed).sample(list(entries), min(WANTED_ENTRIES, len(entries)))
    ids = [tokenizer.encode(f"{entry.title}\n{entry.text}")[: 2 * ENTRY_TOKENS] for entry in chosen]
    return Texts.of([(each, len(each)) for each in ids])


def long_texts(sequences: Iterable[Sequence[int]]) -> Texts:
    """Sequences one after another, cut into at most LONG_TEXTS of LONG_TOKENS; what is left over is dropped."""
    ids = [id_ for sequence in sequences for id_ in sequence][: LONG_TEXTS * LONG_TOKENS]
    starts = range(0, len(ids) - LONG_TOKENS + 1, LONG_TOKENS)
    return Texts.of([(ids[start : start + LONG_TOKENS], LONG_TOKENS) for start in starts])


def shuffled(entries: Sequence[Entry], tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    """Entries in random order, a blank line behind each."""
    chosen = random.Random(seed).sample(list(entries), len(entries))
    return [tokenizer.encode(f"{entry.title}\n{entry.text}\n\n") for entry in chosen]


def parted(texts: Texts) -> list[Texts]:
    """The same sequences in parts of PART."""
    sequences = [(ids, len(ids)) for ids in texts.sequences()]
    return [Texts.of(sequences[start : start + PART]) for start in range(0, len(sequences), PART)]


def chats(folder: Path, model: Llama, tokenizer: Tokenizer, entries: Sequence[Entry], seed: int) -> list[Texts]:
    """CHUNKS files of chats below `folder`, made where they are not there yet. Each draws from (seed, its number)."""
    found = []
    for number in track(range(CHUNKS), "chats with itself"):
        path = folder / f"chats-{number:03}.npz"
        if not path.exists():
            make_chunk(model, tokenizer, entries, (seed << 16) + number).save(path)
        found.append(Texts.load(path))
    return found


def make_chunk(model: Llama, tokenizer: Tokenizer, entries: Sequence[Entry], seed: int) -> Texts:
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    own = round(OWN_SHARE * CHATS)
    begun, other = (tokenizer.chat([Message("user", word)]) for word in ("Hello", "Why"))
    begun = begun[: shared_length(begun, other)]
    made = generate(model, [begun] * own, QUESTION_TOKENS, tokenizer.eos_ids, generator, [1.0] * own)
    questions = [tokenizer.decode(ids).strip() or "Hello" for ids in made]
    questions += [ask(chance, chance.choice(entries), tokenizer) for _ in range(CHATS - own)]
    prompts = [tokenizer.chat([Message("user", question)]) for question in questions]
    heat = [0.0 if chance.random() < GREEDY_SHARE else TEMPERATURE for _ in prompts]
    answers = generate(model, prompts, ANSWER_TOKENS, tokenizer.eos_ids, generator, heat)
    return Texts.of([([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)])


def ask(chance: random.Random, entry: Entry, tokenizer: Tokenizer) -> str:
    """A question about an entry."""
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
    """What follows each prompt, at most `tokens` ids, up to and with the first that ends a text."""
    longest = max(map(len, prompts))
    starts_B = torch.tensor([longest - len(prompt) for prompt in prompts])
    ids_BT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    heat_B1 = torch.tensor(temperatures)[:, None]
    ends = torch.tensor(sorted(eos_ids))
    pasts: list[Past | None] = [None] * len(model.layers)
    made: list[Tensor] = []
    ended_B = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(tokens):
        x_BTH = model.embed(ids_BT)
        for index, layer in enumerate(model.layers):
            x_BTH, pasts[index] = layer(x_BTH, pasts[index], starts_B)
        logits_BV = model.logits(x_BTH[:, -1]).float()
        noise_BV = -torch.log(-torch.log(torch.rand(logits_BV.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
        ids_B = (logits_BV + heat_B1 * noise_BV).argmax(1)
        made.append(ids_B)
        ended_B |= torch.isin(ids_B, ends)
        if ended_B.all():
            break
        ids_BT = ids_B[:, None]
    return [cut(ids, eos_ids) for ids in torch.stack(made, 1).tolist()]


def cut(ids: list[int], eos_ids: frozenset[int]) -> list[int]:
    """Up to and with the first that ends a text."""
    end = next((index for index, id_ in enumerate(ids) if id_ in eos_ids), len(ids) - 1)
    return ids[: end + 1]
