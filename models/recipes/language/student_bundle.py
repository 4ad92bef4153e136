"""Make a student of any Llama- or Qwen-type model: its texts, its start, its training, its score, its bundle.

teacher --chats--> texts --closed form--> start --distil--> student --4 bits--> bundle --as on a device--> agreement
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from rich.progress import track

from isthmus.models.bundle.files import read_manifest, write_bundle
from isthmus.models.bundle.manifest import Interval
from isthmus.models.language.checkpoint.bundle import LanguageManifest, stored_tensors
from isthmus.models.language.checkpoint.checkpoint import SMOLLM2, Checkpoint
from isthmus.models.language.checkpoint.export import model_settings
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.checkpoint.weights import layer_shapes
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.packing import Floats
from isthmus.models.recipes.common.environment import environment
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import corpus, student_texts
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.llama import Llama, parameter_name
from isthmus.models.recipes.language.prompts import greedy_answers, load_prompts
from isthmus.models.recipes.language.student import (
    NEW_PARTS,
    REPLAYED,
    PartOf,
    Student,
    distil,
    parts_of_piece,
    student_of,
)
from isthmus.models.recipes.language.student_start import influence, kept_layers, start
from isthmus.models.recipes.language.teacher import TeacherOutputs, run_teacher

TEST_EVERY = 4  # every TEST_EVERY-th test prompt is answered
INFLUENCE_CHATS, START_CHATS = 16, 128  # of the first file of texts, for the choice of layers and the closed form
VERSIONS = ("torch", "numpy", "onnxruntime")


def make(
    folder: Path, run: Run, command: str, source: str, prompts: Path, layers: int, tokens: int, *, train: bool = True
) -> LanguageManifest:
    """Train a student of `layers` layers on `tokens` tokens, counting each time that one is read, and write its bundle.

    A rerun goes on after the last finished piece; without `train` it writes the student of that piece.
    Raises InvalidInput, BundleError.
    """
    checkpoint = Checkpoint.open(source)
    test_prompts = load_prompts(prompts, checkpoint.tokenizer, TEST_EVERY)
    run = run.of(recipe="student", model=checkpoint.fingerprint.hex())
    print("opening the model", file=sys.stderr)
    teacher = Llama.load(checkpoint)
    entries = corpus.entries(run.folder)

    def part_of(number: int) -> TeacherOutputs:
        return student_texts.part(run.folder, teacher, checkpoint.tokenizer, entries, run.seed, number)

    retained = chosen_layers(run, teacher, layers, part_of)
    stage = f"student{layers}"
    student, head_VH = begun(run, stage, teacher, retained, part_of)
    if train:
        pieces = round(tokens / part_of(0).ends[-1] / (NEW_PARTS + REPLAYED))
        student = distil(run, stage, student, head_VH, part_of, max(pieces, 1))
    else:
        run.load_average(stage, student)
    _, answers = greedy_answers(run.folder, teacher, checkpoint.tokenizer.eos_ids, test_prompts)
    manifest = {
        "name": folder.name,
        "licence": "Apache-2.0" if source == SMOLLM2 else "as the model's",
        "kind": "language",
        "base": checkpoint.fingerprint.hex(),
        "layers": retained,
        "config": model_settings(replace(checkpoint.config, layers=layers)),
        "weights": "weights.safetensors",
        "tokenizer": "tokenizer",
        "training": describe_training(run, stage, command),
    }
    return write(folder, manifest, tensors_of(student, checkpoint), checkpoint.tokenizer, answers)


def write(
    folder: Path, manifest: dict[str, Any], tensors: dict[str, Floats], tokenizer: Tokenizer, answers: Corpus
) -> LanguageManifest:
    """Write the bundle, with the score that it has as a device runs it. Raises BundleError, InvalidInput."""
    files = {
        manifest["weights"]: safetensors.numpy.save(stored_tensors(tensors)),
        manifest["tokenizer"]: tokenizer.to_bytes(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        unscored = write_bundle(Path(scratch) / folder.name, {**manifest, "scores": {}}, files, LanguageManifest)
        score = agreement(Checkpoint.open(unscored), answers)
    content = {**manifest, "scores": {"agreement": score.model_dump()}}
    return read_manifest(write_bundle(folder, content, files, LanguageManifest), LanguageManifest)


def begun(
    run: Run, stage: str, teacher: Llama, retained: Sequence[int], part_of: PartOf
) -> tuple[Student, torch.Tensor]:
    """A student in its closed form, and its output head. What a checkpoint has is not fitted, as it is overwritten."""
    some = None
    if not run.checkpoint(stage).exists():
        some = run_some(teacher, part_of(0), START_CHATS, [*retained[1:], teacher.config.layers])
    return student_of(start(teacher, retained, some))


def chosen_layers(run: Run, teacher: Llama, count: int, part_of: PartOf) -> list[int]:
    """The layers to keep, which are chosen once and then read from the run's folder. Raises InvalidInput."""
    path = run.folder / f"layers{count}.json"
    if not path.exists():
        outputs = run_some(teacher, part_of(0), INFLUENCE_CHATS, range(teacher.config.layers + 1))
        path.write_text(json.dumps(kept_layers(influence(outputs), count)) + "\n", encoding="utf-8")
    return [int(index) for index in json.loads(path.read_text(encoding="utf-8"))]


def run_some(teacher: Llama, outputs: TeacherOutputs, count: int, depths: Sequence[int]) -> TeacherOutputs:
    """Some sequences, at most `count`, with the teacher's hidden states at some depths."""
    step = -(-len(outputs) // count)
    chosen = [outputs.select(s).ids_N.tolist() for s in range(0, len(outputs), step)]
    return run_teacher(teacher, Corpus.from_sequences([(ids, len(ids)) for ids in chosen]), depths)


def tensors_of(student: Student, checkpoint: Checkpoint) -> dict[str, Floats]:
    """A student's tensors by their Hugging Face names."""
    heads = () if checkpoint.config.tied else ("lm_head.weight",)
    found = {name: checkpoint.tensor(name) for name in ("model.embed_tokens.weight", *heads)}
    for index, layer in enumerate(student.layers):
        for name in layer_shapes(checkpoint.config):
            path, _, leaf = name.rpartition(".")
            found[f"model.layers.{index}.{name}"] = layer.get_parameter(parameter_name(path, leaf)).detach().numpy()
    return {**found, "model.norm.weight": student.norm_H.detach().numpy()}


def agreement(student: Checkpoint, answers: Corpus) -> Interval:
    """How many of the teacher's greedy tokens the student chooses, as a device runs it, after the same text."""
    starts = [0, *answers.ends_S[:-1].tolist()]
    longest = max(end - start for start, end in zip(starts, answers.ends_S.tolist(), strict=True))
    decoder = OnnxDecoder(student, longest, 4, torch.get_num_threads())
    right = []
    for ids, first in track(list(zip(answers.sequences(), (answers.answers_S - starts).tolist(), strict=True)), "test"):
        decoder.truncate(0)
        decoder.append(ids[:-1])
        logits_NV = decoder.logits(decoder.advance(0)[first - 1 :])
        right.append(logits_NV.argmax(1) == np.array(ids[first:]))
    return interval(np.concatenate(right))


def describe_training(run: Run, stage: str, command: str) -> dict[str, Any]:
    """The manifest's record of the training run."""
    logged = [line for line in run.logged() if line["stage"] == stage]
    read = [number for index in range(len(logged)) for number in parts_of_piece(index)]
    tokens = {number: student_texts.load_part(run.folder, number).ends[-1] for number in set(read)}
    return {
        "command": command,
        "seed": run.seed,
        "seconds": sum(float(line["seconds"]) for line in logged),
        **environment(VERSIONS),
        "data": f"{sum(tokens[number] for number in read)} tokens, {sum(tokens.values())} of them distinct: the"
        " teacher's chats with itself and about entries of FOLDOC and the Jargon File",
    }
