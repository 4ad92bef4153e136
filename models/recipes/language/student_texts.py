"""Texts for a student: a teacher's chats with itself, and its likely tokens at each position, kept as it generates.

    questions --sorted by length--> batches --teacher, token by token--> answers, TEACHER_TOKENS log-probabilities

No second pass reads the texts. Sequences that have ended leave their batch. Source: Xu et al., "Magpie" (2024).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.language.drafts import shared_length
from isthmus.models.recipes.language.corpus import (
    GREEDY_SHARE,
    TEMPERATURE,
    Entry,
    question_about,
    truncate_at_end,
)
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.teacher import TEACHER_TOKENS, TeacherOutputs

PART_CHATS = 128
OWN_SHARE, FREE_SHARE = 0.75, 0.3  # of questions that the model samples itself, and of those that begin anyhow
QUESTION_TOKENS, ANSWER_TOKENS = 64, 128
BATCH_TOKENS = 28_000  # of a batch's KV caches: 0.65 GB for SmolLM2
HEAD_ROWS = 512  # positions for which the output head is computed at once
LEAVING = 0.25  # share of a batch that has ended before its KV caches are copied without it
BEGINNINGS = (  # of questions, so that they are of many kinds; the model samples the rest
    "who", "Who was the first", "who wrote", "when did", "When was", "where is", "where does the", "what is the",
    "What was", "how many", "how much does", "how do you", "why do", "which", "what does it mean", "is it",
    "Can you explain", "Explain", "Describe", "Compare", "Compose", "Draft", "Suggest", "Imagine you are",
    "Pretend to be", "Write a", "Write a function", "Implement", "Solve", "Calculate the", "Find the", "If", "Given",
    "Suppose", "Evaluate", "Extract", "Rewrite", "Correct the following sentence:", "Classify", "List", "Summarize:",
    "Translate German to English:", "Translate German to English: Die", "Translate German to English: Der",
    "Translate German to English: Ich", "Translate German to English: Es", "A farmer has", "A store sells",
    "A train travels at", "A baker makes", "Tom has", "Maria buys", "James earns $", "Lily is", "Each box holds",
    "In a class of", "There are", "A pool", "Sam wants to",
)  # fmt: skip


@dataclass
class Answer:
    """Token ids of a prompt and its answer, and the teacher's likely tokens (N, K) after each from `first` on."""

    ids: list[int]
    prompt: int  # tokens
    first: int
    top_NK: Tensor
    logprobs_NK: Tensor


def make_part(model: Llama, tokenizer: Tokenizer, entries: Sequence[Entry], seed: int, chats: int) -> TeacherOutputs:
    """`chats` chats: questions of the model itself or about entries, and the model's answers."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    opening, other = (tokenizer.chat([Message("user", word)]) for word in ("Hello", "Why"))
    opening = opening[: shared_length(opening, other)]
    own = round(OWN_SHARE * chats)
    begun = [tokenizer.encode("" if chance.random() < FREE_SHARE else chance.choice(BEGINNINGS)) for _ in range(own)]
    sampled = answer(
        model, [[*opening, *ids] for ids in begun], QUESTION_TOKENS, tokenizer.eos_ids, generator, [1.0] * own, 0
    )
    questions = [tokenizer.decode(each.ids[len(opening) :]).strip() or "Hello" for each in sampled]
    questions += [question_about(chance, chance.choice(entries), tokenizer) for _ in range(chats - own)]
    prompts = sorted((tokenizer.chat([Message("user", question)]) for question in questions), key=len)
    answers: list[Answer] = []
    for batch in prompt_batches(prompts):
        temperatures = [0.0 if chance.random() < GREEDY_SHARE else TEMPERATURE for _ in batch]
        answers += answer(model, batch, ANSWER_TOKENS, tokenizer.eos_ids, generator, temperatures, len(opening))
    return as_outputs(answers)


def prompt_batches(prompts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Sorted prompts in batches whose KV caches hold at most BATCH_TOKENS."""
    start = 0
    while start < len(prompts):
        count = 1
        while start + count < len(prompts):
            if (count + 1) * (len(prompts[start + count]) + ANSWER_TOKENS) > BATCH_TOKENS:
                break
            count += 1
        yield list(prompts[start : start + count])
        start += count


def as_outputs(answers: Sequence[Answer]) -> TeacherOutputs:
    """Concatenated; positions without likely tokens have log-probabilities of minus infinity."""
    total = sum(len(each.ids) for each in answers)
    top_NK = torch.zeros(total, TEACHER_TOKENS, dtype=torch.int32)
    logprobs_NK = torch.full((total, TEACHER_TOKENS), -torch.inf, dtype=torch.float16)
    ends, starts, position = [], [], 0
    for each in answers:
        here = slice(position + each.first, position + each.first + len(each.top_NK))
        top_NK[here], logprobs_NK[here] = each.top_NK, each.logprobs_NK
        starts.append(position + each.prompt)
        position += len(each.ids)
        ends.append(position)
    ids_N = torch.tensor([id_ for each in answers for id_ in each.ids])
    return TeacherOutputs({}, top_NK, logprobs_NK, ids_N, tuple(ends), tuple(starts))


@torch.inference_mode()
def answer(
    model: Llama, prompts: Sequence[Sequence[int]], tokens: int, eos_ids: frozenset[int],
    generator: torch.Generator, temperatures: Sequence[float], first: int,
) -> list[Answer]:  # fmt: skip
    """Continue each prompt by at most `tokens` ids, up to and including the first that ends a text.

    Ids are sampled among the TEACHER_TOKENS most likely, which are kept from position `first` on.
    """
    batch = Batch(model, prompts, tokens)
    counts = [len(prompt) - first for prompt in prompts]
    prompt_MK = likely(model, batch.prefill()[batch.positions_BT >= first])
    last_B = torch.tensor(counts).cumsum(0) - 1
    top_BK, logprobs_BK = (values_MK[last_B] for values_MK in prompt_MK)
    temperature_B1, ends = torch.tensor(temperatures)[:, None], torch.tensor(sorted(eos_ids))
    shape = len(prompts), tokens, TEACHER_TOKENS
    ids_BT, top_BTK, logprobs_BTK = torch.zeros(shape[:2], dtype=torch.int64), torch.zeros(shape), torch.zeros(shape)
    top_BTK = top_BTK.to(top_BK.dtype)
    rows_B, active_B = torch.arange(len(prompts)), torch.ones(len(prompts), dtype=torch.bool)
    for step in range(tokens):
        noise_BK = -torch.log(-torch.log(torch.rand(top_BK.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
        chosen_B1 = (logprobs_BK + temperature_B1[rows_B] * noise_BK).argmax(1, keepdim=True)
        ids_B = top_BK.gather(1, chosen_B1)[:, 0]
        ids_BT[rows_B, step] = ids_B
        active_B = active_B & ~torch.isin(ids_B, ends)
        if not active_B.any():
            break
        if active_B.float().mean() < 1 - LEAVING:
            batch.keep(active_B)
            rows_B, ids_B, active_B = rows_B[active_B], ids_B[active_B], active_B[active_B]
        if step < tokens - 1:
            top_BK, logprobs_BK = likely(model, batch.step(ids_B))
            top_BTK[rows_B, step], logprobs_BTK[rows_B, step] = top_BK, logprobs_BK
    found = []
    of_prompts = zip(prompts, *(torch.split(values_MK, counts) for values_MK in prompt_MK), strict=True)
    for row, (prompt, top_NK, logprobs_NK) in enumerate(of_prompts):
        ids = truncate_at_end(ids_BT[row].tolist(), eos_ids)
        top_NK = torch.cat([top_NK, top_BTK[row, : len(ids) - 1]])
        logprobs_NK = torch.cat([logprobs_NK, logprobs_BTK[row, : len(ids) - 1]])
        found.append(Answer([*prompt, *ids], len(prompt), first, top_NK, logprobs_NK))
    return found


def likely(model: Llama, x_MH: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities (M, K) of the most likely tokens after outputs of the last layer (M, H)."""
    top, logprobs = [], []
    for x_RH in torch.split(x_MH, HEAD_ROWS):
        logits_RV = model.logits(x_RH)
        values_RK, ids_RK = logits_RV.topk(TEACHER_TOKENS)
        top.append(ids_RK)
        logprobs.append(values_RK.float() - logits_RV.logsumexp(1, keepdim=True).float())
    return torch.cat(top), torch.cat(logprobs)


class Batch:
    """Sequences that grow token by token, padded on the left, with KV caches that are allocated once.

    Keys are stored transposed, (B, kv_heads, D, S), which makes a step's attention twice as fast on a CPU.
    """

    def __init__(self, model: Llama, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        longest, config = max(map(len, prompts)), model.config
        self.model, self.length = model, longest
        self.ids_BT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        self.starts_B = torch.tensor([longest - len(prompt) for prompt in prompts])
        self.positions_BT = torch.arange(longest) - self.starts_B[:, None]
        shape, dtype = (len(prompts), config.kv_heads), model.embedding_VH.dtype
        slots = longest + tokens
        self.keys = [torch.empty(*shape, config.head_dim, slots, dtype=dtype) for _ in model.layers]
        self.values = [torch.empty(*shape, slots, config.head_dim, dtype=dtype) for _ in model.layers]

    def prefill(self) -> Tensor:
        """Outputs of the last layer (B, T, H) for the prompts."""
        x_BTH = self.model.embed(self.ids_BT)
        for layer, keys_BKDS, values_BKSD in zip(self.model.layers, self.keys, self.values, strict=True):
            x_BTH, cache = layer(x_BTH, None, self.starts_B)
            keys_BKDS[..., : self.length] = cache.keys_BKTD.transpose(2, 3)
            values_BKSD[:, :, : self.length] = cache.values_BKTD
        return x_BTH

    def step(self, ids_B: Tensor) -> Tensor:
        """Append a token to each sequence and return the outputs of the last layer (B, H)."""
        x_BTH = self.model.embed(ids_B[:, None])
        positions_BT = (self.length - self.starts_B)[:, None]
        self.length += 1
        padding_BS = torch.arange(self.length) < self.starts_B[:, None]
        for layer, keys_BKDS, values_BKSD in zip(self.model.layers, self.keys, self.values, strict=True):
            q_BTHD, k_BTKD, v_BTKD = layer.project(x_BTH, positions_BT)
            keys_BKDS[..., self.length - 1] = k_BTKD[:, 0]
            values_BKSD[:, :, self.length - 1] = v_BTKD[:, 0]
            mixed = attention(q_BTHD, keys_BKDS[..., : self.length], values_BKSD[:, :, : self.length], padding_BS)
            x_BTH = layer.after_attention(x_BTH, mixed)
        return x_BTH[:, 0]

    def keep(self, kept_B: Tensor) -> None:
        """Drop the other sequences."""
        self.starts_B = self.starts_B[kept_B]
        for caches in (self.keys, self.values):
            for index, cache in enumerate(caches):
                caches[index] = cache[kept_B]


def attention(q_BTHD: Tensor, keys_BKDS: Tensor, values_BKSD: Tensor, padding_BS: Tensor) -> Tensor:
    """What the heads of one token find, (B, 1, heads * D)."""
    batch, _, heads, size = q_BTHD.shape
    kv_heads = keys_BKDS.shape[1]
    scores_BKGS = (q_BTHD.view(batch, kv_heads, heads // kv_heads, size) * size**-0.5) @ keys_BKDS
    weights_BKGS = scores_BKGS.float().masked_fill(padding_BS[:, None, None], -torch.inf).softmax(-1)
    mixed_BKGD: Tensor = weights_BKGS.to(values_BKSD.dtype) @ values_BKSD
    return mixed_BKGD.view(batch, 1, -1)


def part(
    folder: Path, model: Llama, tokenizer: Tokenizer, entries: Sequence[Entry], seed: int, number: int
) -> TeacherOutputs:
    """One file of chats in `folder`, made where missing, seeded with `seed` and its number."""
    path, started = path_of(folder, number), time.monotonic()
    if not path.exists():
        made = make_part(model, tokenizer, entries, (seed << 16) + number, PART_CHATS)
        save(made, path)
        print(f"{path.name}: {made.ends[-1]} tokens in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return load_part(folder, number)


def path_of(folder: Path, number: int) -> Path:
    return folder / f"texts-{number:03}.pt"


def load_part(folder: Path, number: int) -> TeacherOutputs:
    """A file of chats that is there, as a memory map."""
    return TeacherOutputs(**torch.load(path_of(folder, number), weights_only=True, mmap=True))


def save(outputs: TeacherOutputs, path: Path) -> None:
    partial = path.with_suffix(".part")
    torch.save({field.name: getattr(outputs, field.name) for field in fields(TeacherOutputs)}, partial)
    partial.replace(path)
