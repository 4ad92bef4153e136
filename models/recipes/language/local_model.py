"""Local models: the whole model in few bits on a device, with a confidence head and the worth of offloading.

answers --quantised model--> choices, features --half--> confidence head --other half--> offload levels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.language.confidence_head import confidences, head_tensors, train_confidence_head
from isthmus.models.recipes.language.device_outputs import Tensors, features_after
from isthmus.models.recipes.language.teacher import TeacherOutputs

BITS = (8, 4)
ANSWERS = 600  # at most, for confidence heads and offload levels
# Offload rates of the levels
RATES = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def local_models(
    checkpoint: Checkpoint, teacher: TeacherOutputs, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Tensors]]:
    """Manifest entries of the local models, and the tensors of their confidence heads by file name."""
    answers = [s for s in range(len(teacher)) if teacher.has_answer(s)]
    chosen = answers[:: len(answers) // ANSWERS + 1]
    entries: list[dict[str, Any]] = []
    files: dict[str, Tensors] = {}
    for bits in BITS:
        training, (features_NF, right_N) = (
            answer_features(checkpoint, bits, teacher, part) for part in (chosen[::2], chosen[1::2])
        )
        head = train_confidence_head(*training, seed + bits)
        name = f"copy{bits}.safetensors"
        files[name] = head_tensors(head)
        levels = offload_levels(confidences(head, features_NF), right_N)
        entries.append({"bits": bits, "judge": name, "levels": levels})
    return entries, files


def answer_features(
    checkpoint: Checkpoint, bits: int, teacher: TeacherOutputs, sequences: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """For each token of the answers: inputs of a confidence head (N, F), and whether the choice is right (N,)."""
    longest = max(end - start for start, end in map(teacher.bounds, sequences))
    decoder = OnnxDecoder(checkpoint, longest, bits, torch.get_num_threads())
    inputs, right = [], []
    for sequence in track(sequences, f"local model in {bits} bits"):
        start, end = teacher.bounds(sequence)
        first = teacher.answers[sequence] - 1
        decoder.truncate(0)
        text = teacher.ids_N[start : end - 1].tolist()
        decoder.append(text)
        logits_NV = decoder.logits(decoder.advance(0)[first - start :])
        inputs.append(features_after(logits_NV, text, first - start))
        right.append(torch.from_numpy(logits_NV.argmax(1)) == teacher.top_NK[first : end - 1, 0])
    return torch.cat(inputs), torch.cat(right)


def offload_levels(confidence_N: Tensor, right_N: Tensor) -> list[dict[str, float]]:
    """The offload levels at RATES, by rising threshold from 0."""
    levels: dict[float, dict[str, float]] = {}
    for rate in RATES:
        threshold = float(confidence_N.quantile(rate)) if rate else 0.0
        offloaded_N = confidence_N < threshold
        wrong = interval((~offloaded_N & ~right_N).numpy())
        levels[threshold] = {"likely": threshold, "asked": float(offloaded_N.float().mean()), "wrong": wrong.high}
    return list(levels.values())
