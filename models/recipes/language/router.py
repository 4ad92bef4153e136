"""The model's copy on a device: a judge of its choices, and what asking the cloud for those in doubt is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.language.confidence_head import judged, train_judge
from isthmus.models.recipes.language.device import Tensors, seen_behind
from isthmus.models.recipes.language.exits import Traces

BITS = (8, 4)
ANSWERS = 600  # that judges and levels come from
SHARES = (
    0.0,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.07,
    0.1,
    0.13,
    0.16,
    0.2,
    0.25,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
)  # asked for


def copies(checkpoint: Checkpoint, traces: Traces, seed: int) -> tuple[list[dict[str, Any]], dict[str, Tensors]]:
    """Manifest entries of the device's copies, and their files."""
    chats = [s for s in range(len(traces)) if traces.answers[s] < traces.bounds(s)[1] - 1]
    chosen = chats[:: len(chats) // ANSWERS + 1]
    entries: list[dict[str, Any]] = []
    files: dict[str, Tensors] = {}
    for bits in BITS:
        learnt, kept = (answers(checkpoint, bits, traces, part) for part in (chosen[::2], chosen[1::2]))
        judge = train_judge(*learnt, seed + bits)
        name = f"copy{bits}.safetensors"
        files[name] = {f"judge.{key}": value.detach().numpy() for key, value in judge.state_dict().items()}
        entries.append({"bits": bits, "judge": name, "levels": levels(judged(judge, kept[0]), kept[1])})
    return entries, files


def answers(checkpoint: Checkpoint, bits: int, traces: Traces, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What a judge sees (N, F) at each token of the answers, and whether the copy's choice is the full model's (N,)."""
    longest = max(end - start for start, end in map(traces.bounds, sequences))
    decoder = OnnxDecoder(checkpoint, longest, bits, torch.get_num_threads())
    seen, right = [], []
    for sequence in track(sequences, f"the device's copy in {bits} bits"):
        start, end = traces.bounds(sequence)
        first = traces.answers[sequence] - 1
        decoder.truncate(0)
        text = traces.ids_N[start : end - 1].tolist()
        decoder.append(text)
        logits_NV = decoder.logits(decoder.advance(0)[first - start :])
        seen.append(seen_behind(logits_NV, text, first - start))
        right.append(torch.from_numpy(logits_NV.argmax(1)) == traces.top_NK[first : end - 1, 0])
    return torch.cat(seen), torch.cat(right)


def levels(likely_N: Tensor, right_N: Tensor) -> list[dict[str, float]]:
    """What asking for these shares of tokens is worth; they rise in likelihood from 0."""
    found: dict[float, dict[str, float]] = {}
    for share in SHARES:
        likely = float(likely_N.quantile(share)) if share else 0.0
        asked_N = likely_N < likely
        wrong = interval((~asked_N & ~right_N).numpy())
        found[likely] = {"likely": likely, "asked": float(asked_N.float().mean()), "wrong": wrong.high}
    return list(found.values())
