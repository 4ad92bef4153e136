"""Train the exits, hidden-state codec and KV fill of an unchanged language model, and write a handoff bundle.

    texts --full model--> teacher outputs --distil--> exits --held out--> confidence heads, thresholds
                                          --sensitivity, tokens--> codec    --ridge, distil--> KV fill

Of the held-out sequences, some tokens train confidence heads and the others measure thresholds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
import torch

from isthmus.models.bundle.files import read_manifest, write_bundle
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.checkpoint import SMOLLM2
from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.handoff.manifest import HandoffManifest
from isthmus.models.recipes.common.environment import environment
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import corpus
from isthmus.models.recipes.language.device_outputs import DeviceOutputs, Tensors, exit_tensors, run_device
from isthmus.models.recipes.language.exits import Exit, initialise, train_exit
from isthmus.models.recipes.language.hidden_states import RATE_BYTES, fit_states, inputs_at, sensitivity
from isthmus.models.recipes.language.kv_fill import fit_maps, train_maps
from isthmus.models.recipes.language.preparation import (
    HELD_OUT,
    Prepared,
    exit_depths,
    open_checkpoint,
    prepare,
    teacher_outputs,
)
from isthmus.models.recipes.language.prompts import greedy_answers, load_prompts
from isthmus.models.recipes.language.scores import (
    ExitConfidence,
    measure_points,
    score_exits,
    score_suffix,
    train_exit_confidence,
)
from isthmus.models.recipes.language.suffix import ApproximateKV, CodedStates

EXIT_LAYERS = 1, 2  # decoder layers of the first exit, and of each other
TEST_EVERY = 4  # every TEST_EVERY-th answer to the test prompts is run as on a device
CODEC_STATES = 60_000  # hidden states, at most, that the codec is fitted on
POINTS_EVERY = 4  # every POINTS_EVERY-th held-out chat measures the operating points
SENSITIVITY_CHATS = 240  # at most
MAX_STATE_BYTES = 1152  # of a hidden state of 576 values: its size as 16-bit floats
VERSIONS = ("torch", "numpy", "onnxruntime", "constriction")


@dataclass(frozen=True)
class Trained:
    """The tensors of a bundle's files, and the exits' confidence heads with thresholds."""

    exits: dict[int, Tensors]
    confidence: ExitConfidence
    states: Tensors
    fill: Tensors


def only_exit(run: Run, source: str, depth: int, chosen: Sequence[int] = ()) -> None:
    """Train one exit only, so that several can be trained in parallel. Raises InvalidInput, BundleError."""
    checkpoint = open_checkpoint(source)
    depths = exit_depths(checkpoint.config, chosen)
    if depth not in depths:
        raise InvalidInput(f"there is no exit at depth {depth}, exits are at {depths}")
    train_exit_at(prepare(run, checkpoint, depths), depth)


def make(
    folder: Path, run: Run, command: str, source: str, prompts: Path, chosen: Sequence[int] = ()
) -> HandoffManifest:
    """Train and write a bundle with exits at the depths `chosen`. A rerun continues after the last finished epoch.

    Raises InvalidInput, BundleError.
    """
    checkpoint = open_checkpoint(source)
    depths = exit_depths(checkpoint.config, chosen)
    test_prompts = load_prompts(prompts, checkpoint.tokenizer)
    prepared = prepare(run, checkpoint, depths)
    trained = train_parts(prepared)
    test = run_test_prompts(prepared, trained.exits, test_prompts)
    named = {
        **{f"exit{depth}.safetensors": tensors for depth, tensors in trained.exits.items()},
        "states.safetensors": trained.states,
        "fill.safetensors": trained.fill,
    }
    manifest = {
        "name": bundle_name(source, checkpoint.name) + (f"-{prepared.depth}" if chosen else ""),
        **describe_model(prepared, trained.confidence),
        **measure(prepared, trained, test),
        "training": describe_training(prepared, command),
    }
    saved = {name: safetensors.numpy.save(tensors) for name, tensors in named.items()}
    return read_manifest(write_bundle(folder, manifest, saved, HandoffManifest), HandoffManifest)


def train_parts(prepared: Prepared) -> Trained:
    """Train exits and their confidence heads, the codec and the KV fill."""
    exits = {depth: exit_tensors(train_exit_at(prepared, depth), prepared.checkpoint) for depth in prepared.depths}
    held_out = run_device(prepared.checkpoint, exits, prepared.teacher, prepared.held_out)
    confidence = train_exit_confidence(exits, held_out, prepared.run.seed)
    fill = train_fill(prepared)
    return Trained(exits, confidence, fit_codec(prepared), fill)


def train_exit_at(prepared: Prepared, depth: int) -> Exit:
    """A trained exit; an interrupted run is continued."""
    torch.manual_seed(prepared.run.seed)
    exit_ = Exit(prepared.model.config, depth, EXIT_LAYERS[depth != prepared.depths[0]])
    initialise(exit_, prepared.model, prepared.full)
    training = [s for s in range(len(prepared.teacher)) if s % HELD_OUT]
    return train_exit(prepared.run, exit_, prepared.model, prepared.teacher, training)


def train_fill(prepared: Prepared) -> Tensors:
    """The tensors of `fill.safetensors`."""
    run, model, tokenizer = prepared.run, prepared.model, prepared.checkpoint.tokenizer
    entries = corpus.entries(run.folder)
    chats = corpus.chats(run.folder, model, tokenizer, entries, run.seed)
    kinds = (
        corpus.long_texts(corpus.shuffled(entries, tokenizer, run.seed)),
        corpus.long_texts(ids for each in chats for ids in each.sequences()),
    )
    parts = [part for each in kinds for part in corpus.split_parts(each)]
    named = {f"long-{index}": part for index, part in enumerate(parts)}
    teacher = teacher_outputs(run, model, named, (prepared.depth, model.config.layers))
    maps = fit_maps(model, prepared.full, prepared.depth)
    return train_maps(run, maps, model, teacher, prepared.depth).tensors()


def fit_codec(prepared: Prepared) -> Tensors:
    """The tensors of `states.safetensors`."""
    model, teacher, depth = prepared.model, prepared.teacher, prepared.depth
    training = prepared.answers(held_out=False)
    chosen = training[:: len(training) // SENSITIVITY_CHATS + 1]
    sensitivity_HH = sensitivity(model, teacher, chosen, depth, prepared.run.seed)
    positions_N = teacher.later_N.nonzero()[:, 0]
    positions_N = positions_N[:: len(positions_N) // CODEC_STATES + 1]
    states_NH = teacher.states[depth][positions_N].float().numpy()
    return fit_states(states_NH, inputs_at(model, teacher, positions_N), sensitivity_HH)


def run_test_prompts(prepared: Prepared, exits: dict[int, Tensors], prompts: Sequence[Sequence[int]]) -> DeviceOutputs:
    """Device outputs for some of the model's greedy answers to the test prompts."""
    run, model, eos_ids = prepared.run, prepared.model, prepared.checkpoint.tokenizer.eos_ids
    named = dict([greedy_answers(run.folder, model, eos_ids, prompts)])
    teacher = teacher_outputs(run, model, named, prepared.depths, "test", torch.float32)
    return run_device(prepared.checkpoint, exits, teacher, range(0, len(teacher), TEST_EVERY))


def measure(prepared: Prepared, trained: Trained, test: DeviceOutputs) -> dict[str, Any]:
    """Manifest entries of rates, operating points and scores."""
    model, depth, confidence = prepared.model, prepared.depth, trained.confidence
    codec = StateCodec(trained.states, model.config.hidden, len(RATE_BYTES), MAX_STATE_BYTES)
    chats = prepared.answers(held_out=True)[::POINTS_EVERY]
    outputs = run_device(prepared.checkpoint, trained.exits, prepared.teacher, chats)
    rates, points = measure_points(model, outputs, confidence.offloaded(outputs), depth, codec)
    coded, approximate = CodedStates(model, test.teacher, depth, codec), ApproximateKV.from_tensors(trained.fill)
    suffix = score_suffix(model, test, confidence.offloaded(test), coded, points, approximate)
    scores = {**suffix, **score_exits(confidence, test)}
    return {
        "rates": [rate.model_dump() for rate in rates],
        "points": [point.model_dump() for point in points],
        "max_state_bytes": MAX_STATE_BYTES,
        "scores": {name: score.model_dump() for name, score in scores.items()},
    }


def describe_model(prepared: Prepared, confidence: ExitConfidence) -> dict[str, Any]:
    """Manifest entries that name the model, the exits and the files."""
    agreements = zip(prepared.depths, confidence.agreements, strict=True)
    return {
        "kind": "handoff",
        "licence": "as the model's",
        "base": prepared.checkpoint.fingerprint.hex(),
        "hidden": prepared.model.config.hidden,
        "depth": prepared.depth,
        "exits": [
            {"depth": depth, "weights": f"exit{depth}.safetensors", "agreement": agreement}
            for depth, agreement in agreements
        ],
        "thresholds": [threshold.model_dump() for threshold in confidence.thresholds],
        "states": "states.safetensors",
        "fill": "fill.safetensors",
    }


def describe_training(prepared: Prepared, command: str) -> dict[str, Any]:
    """The manifest's record of the training run."""
    tokens = len(prepared.teacher.ids_N)
    return {
        "command": command,
        "seed": prepared.run.seed,
        "seconds": prepared.run.seconds(),
        **environment(VERSIONS),
        "data": f"{tokens} tokens: the model's chats with itself, entries of FOLDOC and the Jargon File",
    }


def bundle_name(source: str, model: str) -> str:
    """A valid name of a bundle after its model's."""
    return "smollm2" if source == SMOLLM2 else re.sub(r"[^a-z0-9_.-]", "-", model.lower())[:60]
