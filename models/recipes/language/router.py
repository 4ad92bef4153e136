"""Make a router bundle: when the choice of a device's model will do for a model in the cloud, token by token.

    prompts --cloud--> answers --device's model, teacher-forced--> its choices, features of them
        training prompts --> confidence head, thresholds
        test prompts     --> levels, certified over prompts by learn-then-test

Of the cloud's model only its choices are needed. Prompts are split at random; no prompt is in both parts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from isthmus.models.bundle.files import read_manifest, write_bundle
from isthmus.models.bundle.manifest import Interval
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import SMOLLM2, Checkpoint
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.router.manifest import OffloadLevel, RouterManifest, level_for
from isthmus.models.recipes.common.environment import environment
from isthmus.models.recipes.common.origin import of_arrays
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language.confidence_head import confidences, head_tensors, train_confidence_head
from isthmus.models.recipes.language.device_outputs import features_after
from isthmus.models.recipes.language.router_answers import Answer, Cloud, cloud_answers, open_cloud, read_prompts
from isthmus.models.recipes.language.router_levels import (
    QUALITIES,
    Choices,
    mean_interval,
    report,
    thresholds,
    token_levels,
)
from isthmus.models.recipes.language.router_whole import RouterPart, whole_part

TRAINING_SHARE = 0.2  # of the prompts; the others certify
MIN_PROMPTS = 40
PART = 16  # answers whose choices are saved together
HEAD = "head.safetensors"
VERSIONS = ("torch", "numpy", "onnxruntime")


@dataclass(frozen=True)
class DeviceChoices:
    """For N tokens of answers: inputs of a confidence head (N, F), whether the device's choice is the cloud's token
    (N,), and the index of the answer (N,)."""

    features_NF: NDArray[np.float32]
    right_N: NDArray[np.bool_]
    answer_N: NDArray[np.int64]

    def of(self, answers: Sequence[int]) -> DeviceChoices:
        """The tokens of some answers, numbered in this order."""
        place = {answer: index for index, answer in enumerate(answers)}
        chosen_N = np.isin(self.answer_N, list(place))
        numbers_N = np.array([place[answer] for answer in self.answer_N[chosen_N].tolist()], np.int64)
        return DeviceChoices(self.features_NF[chosen_N], self.right_N[chosen_N], numbers_N)


@dataclass(frozen=True)
class Routed:
    """A trained router: its manifest, and what it promises by quality, one line each."""

    manifest: RouterManifest
    lines: list[str]


def make(
    folder: Path, run: Run, command: str, device: str, bits: int, cloud: str, prompts: Path, *, whole: bool = False
) -> Routed:
    """Train and write a router bundle. A rerun continues after the last finished part. Raises IsthmusError.

    `whole`: whole answers are routed too; between two vocabularies they alone are.
    """
    checkpoint = Checkpoint.open(device)
    with open_cloud(cloud) as opened:
        tokens = opened.tokenizer.vocabulary == checkpoint.tokenizer.vocabulary
        answers = answers_of(run, opened, prompts) if tokens else []
        part = whole_part(run, opened, checkpoint, bits, prompts) if whole or not tokens else None
        identity = opened.identity
    parts = [part] if part else []
    if tokens:
        parts.insert(0, token_part(run_for(run, checkpoint, bits, answers), checkpoint, bits, answers))
    data = [each.data for each in parts]
    manifest: dict[str, Any] = {
        "kind": "router",
        "name": f"{model_name(device, checkpoint.name)}-{bits}-{model_name(cloud, identity.name)}"[:64],
        "licence": "as the models'",
        "device": {"name": checkpoint.name, "weights": checkpoint.fingerprint.hex(), "bits": bits},
        "cloud": identity.model_dump(),
        "scores": {name: score.model_dump() for each in parts for name, score in each.scores.items()},
        "training": describe_training(command, run.seed, sum(each.seconds for each in parts), data),
    }
    for each in parts:
        manifest |= each.fields
    files = {each.file: safetensors.numpy.save(each.tensors) for each in parts}
    written = write_bundle(folder, manifest, files, RouterManifest)
    return Routed(read_manifest(written, RouterManifest), [line for each in parts for line in each.lines])


def token_part(run: Run, checkpoint: Checkpoint, bits: int, answers: Sequence[Answer]) -> RouterPart:
    """The confidence head of single tokens and its levels."""
    choices = device_choices(run, checkpoint, bits, answers)
    training, test = split(len(answers), run.seed)
    tensors, levels, measured = fit(choices.of(training), choices.of(test), run.seed)
    tokens = sum(len(answer.tokens) for answer in answers)
    return RouterPart(
        {"head": HEAD, "token_levels": [level.model_dump() for level in levels]},
        HEAD,
        tensors,
        scores(levels, measured, run.seed),
        report(levels, measured),
        run.seconds(),
        f"{tokens} tokens of the cloud's greedy answers to {len(answers)} prompts, {len(training)} for training",
    )


def answers_of(run: Run, cloud: Cloud, file: Path) -> list[Answer]:
    """The cloud's answers to a file's prompts. Raises InvalidInput where there are too few, and IsthmusError."""
    prompts = read_prompts(file, cloud.tokenizer)
    if len(prompts) < MIN_PROMPTS:
        raise InvalidInput(f"{file} has {len(prompts)} prompts that fit, at least {MIN_PROMPTS} are needed")
    apart = Run(run.folder / "answers", run.seed, apart=True).of(recipe="router answers", cloud=str(cloud.identity))
    return cloud_answers(apart.folder / "answers.jsonl", cloud, prompts)


def run_for(run: Run, checkpoint: Checkpoint, bits: int, answers: Sequence[Answer]) -> Run:
    """The run of one device's model over these answers."""
    ids = [np.array([*answer.prompt, -1, *answer.tokens]) for answer in answers]
    origin = {"device": checkpoint.fingerprint.hex(), "bits": str(bits), "answers": of_arrays(*ids)}
    return Run(run.folder / "device", run.seed, apart=True).of(recipe="router", **origin)


def device_choices(run: Run, checkpoint: Checkpoint, bits: int, answers: Sequence[Answer]) -> DeviceChoices:
    """The device's choices at each token of the answers, with the answer's own text before it."""
    longest = max(len(answer.prompt) + len(answer.tokens) for answer in answers)
    starts = range(0, len(answers), PART)
    missing = [start for start in starts if not (run.folder / f"choices-{start}.npz").exists()]
    decoder = OnnxDecoder(checkpoint, longest, bits, torch.get_num_threads()) if missing else None
    for start in track(missing, f"device's model in {bits} bits", console=Console(stderr=True)):
        assert decoder is not None
        began_s, path = time.monotonic(), run.folder / f"choices-{start}.npz"
        found = [answer_choices(decoder, answer) for answer in answers[start : start + PART]]
        index_N = np.repeat(np.arange(start, start + len(found)), [len(right_N) for _, right_N in found])
        partial = path.with_suffix(".part.npz")
        features_NF, right_N = (np.concatenate(each) for each in zip(*found, strict=True))
        np.savez(partial, features=features_NF, right=right_N, answer=index_N)
        partial.replace(path)
        run.record(f"choices-{start}", time.monotonic() - began_s)
    parts = [np.load(run.folder / f"choices-{start}.npz") for start in starts]
    return DeviceChoices(*(np.concatenate([part[name] for part in parts]) for name in ("features", "right", "answer")))


def answer_choices(decoder: OnnxDecoder, answer: Answer) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """For each token of one answer: inputs of a confidence head (N, F), and whether the choice is that token (N,)."""
    text = [*answer.prompt, *answer.tokens[:-1]]
    first = len(answer.prompt) - 1
    decoder.truncate(0)
    decoder.append(text)
    logits_NV = decoder.logits(decoder.advance(0)[first:])
    return features_after(logits_NV, text, first).numpy(), logits_NV.argmax(1) == np.array(answer.tokens)


def split(answers: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training answers and of the test answers, each in random order."""
    order = np.random.default_rng(seed).permutation(answers).tolist()
    count = round(TRAINING_SHARE * answers)
    return order[:count], order[count:]


def fit(
    training: DeviceChoices, test: DeviceChoices, seed: int
) -> tuple[dict[str, NDArray[Any]], list[OffloadLevel], Choices]:
    """The tensors of a confidence head, its levels, and the test choices with its confidences."""
    features_NF, right_N = torch.from_numpy(training.features_NF), torch.from_numpy(training.right_N)
    head = train_confidence_head(features_NF, right_N, seed)
    known, measured = (
        Choices(
            confidences(head, torch.from_numpy(each.features_NF)).numpy().astype(np.float64),
            each.right_N,
            each.answer_N,
        )
        for each in (training, test)
    )
    return head_tensors(head), token_levels(thresholds(known.confidence_N), measured, seed), measured


def scores(levels: Sequence[OffloadLevel], test: Choices, seed: int) -> dict[str, Interval]:
    """Shares of the tokens of test answers that are the cloud's: by the device alone, and at each certified quality."""
    found = {"test device alone": mean_interval(1 - test.losses(0), seed)}
    for quality in QUALITIES:
        level = level_for(levels, quality)
        if level is not None:
            found[f"test quality {quality:g}"] = mean_interval(1 - test.losses(level.likely), seed)
    return found


def describe_training(command: str, seed: int, seconds: float, data: Sequence[str]) -> dict[str, Any]:
    """The manifest's record of the training run."""
    return {
        "command": command,
        "seed": seed,
        "seconds": seconds,
        **environment(VERSIONS),
        "data": "; ".join(data),
    }


def model_name(source: str, name: str) -> str:
    """A part of a bundle's name for a model."""
    return SMOLLM2 if source == SMOLLM2 else re.sub(r"[^a-z0-9_.-]", "-", name.lower())[:28].strip("-.") or "model"
