"""Exits, hidden states and KV fill of a language model, all else left as it is -> a hand-off bundle.

    chats with itself, dictionaries --full model--> traces --distil--> exits --held out--> judges
                                                          --harm, tokens--> states    --ridge, distil--> KV fill

A twentieth of the sequences is held out: judges learn on one half of it, and thresholds are measured on the other.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.models.bundle.files import read_manifest, write_bundle
from isthmus.models.bundle.manifest import Interval
from isthmus.models.errors import InvalidInput
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import SMOLLM2, Checkpoint
from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.handoff.manifest import HandoffManifest, StatePoint, StateRate, Threshold, least_likely
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import text as language_text
from isthmus.models.recipes.language.confidence_head import decided, judged, train_judge
from isthmus.models.recipes.language.device import Observed, Tensors, exit_tensors, observe
from isthmus.models.recipes.language.evaluate import Crossing, Fill, answered, chats, completed
from isthmus.models.recipes.language.exits import Exit, Traces, start, trace, train
from isthmus.models.recipes.language.hidden_states import RATE_BYTES, fit_states, harm, token_pairs
from isthmus.models.recipes.language.kv_fill import fit_maps, train_maps
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.router import copies
from isthmus.models.recipes.language.text import Texts

SHARES = (1 / 2, 2 / 3)  # of the layers, where exits are unless said otherwise
EXIT_LAYERS = 1, 2  # decoder layers of the first exit, and of each other
HELD_OUT = 20  # every so manyth sequence
JUDGED = 0.6  # of the held out tokens teach the judges; thresholds are measured on the others
TESTED = 4  # every so manyth answer to the test prompts is run as on a device
CONFIDENCES = tuple(round(0.5 + step / 100, 2) for step in range(50))
STATE_ROWS = 60_000  # that transform and tables are fitted on
CROSSED = 4  # every so manyth held out chat tells what rates are worth
ASKING = 0.97  # of the tokens that exits decide are the model's, where that is measured
PAIRED = 5  # steps that the rate of rows that are not asked for may be below that of those that are
HARMED = 240  # chats that tell what errors of rows do
MAX_STATE_BYTES = 1152  # of a row of 576 values: what it takes as 16-bit floats
Scores = dict[str, Interval]
VERSIONS = ("torch", "numpy", "onnxruntime", "constriction")
FULL_PARTS = 3  # of chats, and of entries, whose rows of all depths are kept: for what is found in closed form


def exit_depths(config: LlamaConfig, chosen: Sequence[int] = ()) -> tuple[int, ...]:
    """Behind how many layers exits are: those chosen, or at SHARES. Raises InvalidInput."""
    depths = tuple(sorted(set(chosen))) or tuple(round(share * config.layers) for share in SHARES)
    if not 0 < depths[0] <= depths[-1] < config.layers:
        raise InvalidInput(f"exits at {depths}, expected behind 1 to {config.layers - 1} layers")
    return depths


def texts(run: Run, model: Llama, checkpoint: Checkpoint) -> dict[str, Texts]:
    """All sequences to learn from, by name; made where they are not there yet."""
    entries = language_text.entries(run.folder)
    found = language_text.chats(run.folder, model, checkpoint.tokenizer, entries, run.seed)
    named = {f"chats-{index:03}": each for index, each in enumerate(found)}
    plain = language_text.plain_texts(entries, checkpoint.tokenizer, run.seed)
    return {**named, **{f"entries-{index}": each for index, each in enumerate(language_text.parted(plain))}}


def traces(
    run: Run,
    model: Llama,
    named: dict[str, Texts],
    wanted: Sequence[int],
    label: str = "trace",
    dtype: torch.dtype = torch.bfloat16,
) -> Traces:
    """What the model makes of all of them, at the wanted depths; kept on disk, file by file."""
    found = []
    for name, each in named.items():
        path = run.folder / f"{label}-{name}-{'-'.join(map(str, wanted))}.pt"
        if not path.exists():
            made = trace(model, each, wanted, dtype)
            torch.save({field.name: getattr(made, field.name) for field in fields(Traces)}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        found.append(Traces(**torch.load(path, weights_only=True, mmap=True)))
    return Traces.joined(found)


def filling(run: Run, model: Llama, checkpoint: Checkpoint, depth: int, full: Traces) -> dict[str, NDArray[Any]]:
    """The tensors of `fill.safetensors`."""
    entries, tokenizer = language_text.entries(run.folder), checkpoint.tokenizer
    talks = language_text.chats(run.folder, model, tokenizer, entries, run.seed)
    kinds = (
        language_text.long_texts(language_text.shuffled(entries, tokenizer, run.seed)),
        language_text.long_texts(ids for each in talks for ids in each.sequences()),
    )
    parts = [part for texts in kinds for part in language_text.parted(texts)]
    named = {f"long-{index}": part for index, part in enumerate(parts)}
    learnt = traces(run, model, named, (depth, model.config.layers))
    return train_maps(run, fit_maps(model, full, depth), model, learnt, depth).tensors()


def stating(run: Run, model: Llama, learnt: Traces, depth: int) -> dict[str, NDArray[Any]]:
    """The tensors of `states.safetensors`."""
    taught = [s for s in answering(learnt) if s % HELD_OUT]
    harm_HH = harm(model, learnt, taught[:: len(taught) // HARMED + 1], depth, run.seed)
    places_N = learnt.later_N.nonzero()[:, 0]
    places_N = places_N[:: len(places_N) // STATE_ROWS + 1]
    rows_NH = learnt.rows[depth][places_N].float().numpy()
    return fit_states(rows_NH, token_pairs(model, learnt, places_N), harm_HH)


def answering(traces: Traces) -> list[int]:
    """Sequences in which something is decided."""
    return [s for s in range(len(traces)) if traces.answers[s] < traces.bounds(s)[1] - 1]


def exit_at(run: Run, model: Llama, depth: int, depths: Sequence[int], learnt: Traces, full: Traces) -> Exit:
    """A trained exit; a run that was interrupted goes on."""
    torch.manual_seed(run.seed)
    exit_ = Exit(model.config, depth, EXIT_LAYERS[depth != depths[0]])
    start(exit_, model, full)
    chosen = [index for index in range(len(learnt)) if index % HELD_OUT]
    return train(run, exit_, model, learnt, chosen)


def opened(source: str) -> Checkpoint:
    """Raises BundleError, InvalidInput for a model that exits cannot share the head of."""
    checkpoint = Checkpoint.open(source)
    if not checkpoint.config.tied:
        raise InvalidInput(f"{checkpoint.name}: its output head is not its embedding, which exits here share")
    return checkpoint


def prepare(run: Run, checkpoint: Checkpoint, depths: tuple[int, ...]) -> tuple[Llama, Traces, Traces]:
    """Model and traces: those to learn from, and a few of all depths."""
    run.folder.mkdir(parents=True, exist_ok=True)
    print("opening the model", file=sys.stderr)
    model = Llama.load(checkpoint)
    named = texts(run, model, checkpoint)
    few = {name: each for name, each in named.items() if int(name.rpartition("-")[2]) < FULL_PARTS}
    full = traces(run, model, few, sorted({*depths, *range(depths[-1], model.config.layers + 1)}), "full")
    return model, traces(run, model, named, depths), full


def only_exit(work: Path, seed: int, source: str, depth: int, chosen: Sequence[int] = ()) -> None:
    """Train one exit alone, so that several can be trained side by side. Raises InvalidInput, BundleError."""
    run, checkpoint = Run(work, seed), opened(source)
    depths = exit_depths(checkpoint.config, chosen)
    if depth not in depths:
        raise InvalidInput(f"there is no exit at depth {depth}, exits are at {depths}")
    model, learnt, full = prepare(run, checkpoint, depths)
    exit_at(run, model, depth, depths, learnt, full)


def make(
    folder: Path, run: Run, command: str, source: str, prompts: Path, chosen: Sequence[int] = ()
) -> HandoffManifest:
    """The whole recipe, exits behind `chosen` layers. Interrupted, it goes on where its last epoch ended.

    Raises InvalidInput, BundleError.
    """
    checkpoint = opened(source)
    depths = exit_depths(checkpoint.config, chosen)
    asked = chats(prompts, checkpoint.tokenizer)
    model, learnt, full = prepare(run, checkpoint, depths)
    tested = traces(
        run,
        model,
        dict([answered(run.folder, model, checkpoint.tokenizer.eos_ids, asked)]),
        depths,
        "test",
        torch.float32,
    )
    exits = {depth: exit_tensors(exit_at(run, model, depth, depths, learnt, full), checkpoint) for depth in depths}
    held_out = observe(checkpoint, exits, learnt, range(0, len(learnt), HELD_OUT))
    test = observe(checkpoint, exits, tested, range(0, len(tested), TESTED))

    judging = judge(exits, held_out, run.seed)
    fill = filling(run, model, checkpoint, depths[-1], full)
    states = stating(run, model, learnt, depths[-1])
    codec = StateCodec(states, model.config.hidden, len(RATE_BYTES), MAX_STATE_BYTES)
    seen = observe(checkpoint, exits, learnt, [s for s in answering(learnt) if s % HELD_OUT == 0][::CROSSED])
    rates, points = crossing(model, seen, judging.asked(seen), depths[-1], codec)
    scores = completing(model, test, judging.asked(test), depths[-1], codec, points, Fill.of(fill))
    files = {f"exit{depth}.safetensors": safetensors.numpy.save(tensors) for depth, tensors in exits.items()}
    files |= {"states.safetensors": safetensors.numpy.save(states), "fill.safetensors": safetensors.numpy.save(fill)}
    entries, judges_of_copies = copies(checkpoint, learnt, run.seed)
    files |= {name: safetensors.numpy.save(tensors) for name, tensors in judges_of_copies.items()}
    manifest = {
        "kind": "handoff",
        "name": name_of(source, checkpoint.name) + (f"-{depths[-1]}" if chosen else ""),
        "licence": "as the model's",
        "base": checkpoint.fingerprint.hex(),
        "hidden": model.config.hidden,
        "depth": depths[-1],
        "exits": [
            {"depth": depth, "weights": f"exit{depth}.safetensors", "agreement": agreement}
            for depth, agreement in zip(exits, judging.agreements, strict=True)
        ],
        "thresholds": [threshold.model_dump() for threshold in judging.thresholds],
        "states": "states.safetensors",
        "rates": [rate.model_dump() for rate in rates],
        "points": [point.model_dump() for point in points],
        "max_state_bytes": MAX_STATE_BYTES,
        "fill": "fill.safetensors",
        "copies": entries,
        "training": {
            "command": command,
            "seed": run.seed,
            "seconds": run.seconds(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "data": f"{len(learnt.ids_N)} tokens: the model's chats with itself, entries of FOLDOC and the Jargon File",
            "versions": {name: version(name) for name in VERSIONS},
        },
        "scores": {name: score.model_dump() for name, score in {**scores, **deciding(judging.judges, test)}.items()},
    }
    return read_manifest(write_bundle(folder, manifest, files, HandoffManifest), HandoffManifest)


@dataclass(frozen=True)
class Judging:
    """A judge of each exit, how many of its choices are the model's, and thresholds: on tokens that neither saw."""

    judges: list[nn.Sequential]
    agreements: list[float]
    thresholds: list[Threshold]

    def asked(self, observed: Observed) -> Tensor:
        """Of every position (N,), whether it decides a token of an answer, and no exit is sure of that."""
        each = decided(likely(self.judges, observed), observed.right_EN, least_likely(self.thresholds, ASKING))
        return observed.decides_N & ~each.sure_N


def judge(exits: Mapping[int, Tensors], held_out: Observed, seed: int) -> Judging:
    """Judges, which are added to the tensors of their exits."""
    chosen_N = torch.rand(held_out.right_EN.shape[1], generator=torch.Generator().manual_seed(seed)) < JUDGED
    judges = []
    for (depth, tensors), seen_NF, right_N in zip(exits.items(), held_out.seen_ENF, held_out.right_EN, strict=True):
        judges.append(train_judge(seen_NF[chosen_N], right_N[chosen_N], seed + depth))
        state = judges[-1].state_dict()
        tensors.update({f"judge.{name}": value.detach().numpy() for name, value in state.items()})
    likely_EN, right_EN = likely(judges, held_out)[:, ~chosen_N], held_out.right_EN[:, ~chosen_N]
    thresholds = []
    for confidence in CONFIDENCES:
        found = decided(likely_EN, right_EN, confidence)
        thresholds.append(Threshold(confidence=confidence, coverage=found.coverage, agreement=found.agreement))
    return Judging(judges, right_EN.float().mean(1).tolist(), thresholds)


def name_of(source: str, model: str) -> str:
    """What a bundle may be called after its model."""
    return "smollm2" if source == SMOLLM2 else re.sub(r"[^a-z0-9_.-]", "-", model.lower())[:60]


def likely(judges: Sequence[nn.Sequential], observed: Observed) -> Tensor:
    """How likely right (E, N) each exit's choice is."""
    return torch.stack([judged(judge, seen_NF) for judge, seen_NF in zip(judges, observed.seen_ENF, strict=True)])


def deciding(judges: Sequence[nn.Sequential], test: Observed) -> Scores:
    """Coverage of the exits and agreement with the model, on answers to the test prompts, at some thresholds."""
    likely_EN, right_EN = likely(judges, test)[:, test.decides_N], test.right_EN[:, test.decides_N]
    scores = {}
    for index, right_N in enumerate(right_EN):
        scores[f"test exit{index} agreement"] = interval(right_N.numpy())
    for confidence in (0.8, 0.9, 0.95, 0.97):
        found = decided(likely_EN, right_EN, confidence)
        scores[f"test coverage from {confidence:g}"] = interval(found.sure_N.numpy())
        if found.sure_N.any():
            scores[f"test agreement from {confidence:g}"] = interval(found.right_N[found.sure_N].numpy())
    return scores


def crossing(
    model: Llama, seen: Observed, asked_N: Tensor, depth: int, codec: StateCodec
) -> tuple[list[StateRate], list[StatePoint]]:
    """What rows cost at each rate, and what pairs of rates are worth: for rows that are asked for, and for others.

    Of the pairs those are left than which none is both cheaper and better.
    """
    full_N = seen.traces.top_NK[:, 0]
    crossed = Crossing(model, seen.traces, depth, codec)
    pairs = [(low, high) for high in codec.rates for low in range(max(high - PAIRED, 0), high + 1)]
    found = []
    for low, high in pairs:
        traces, mean_bytes = crossed.at(low, high, asked_N)
        agreement = float((completed(model, traces, depth).chosen_N == full_N)[asked_N].float().mean())
        found.append(StatePoint(context_rate=low, rate=high, mean_bytes=mean_bytes, agreement=agreement))
    points, best = [], 0.0
    for point in sorted(found, key=lambda point: point.mean_bytes):
        if point.agreement > best:
            points.append(point)
            best = point.agreement
    sizes = [crossed.coded(rate)[1] for rate in codec.rates]
    rates = [StateRate(mean_bytes=float(sizes_N.mean()), max_bytes=int(sizes_N.max())) for sizes_N in sizes]
    return rates, points


def completing(
    model: Llama,
    test: Observed,
    asked_N: Tensor,
    depth: int,
    codec: StateCodec,
    points: Sequence[StatePoint],
    fill: Fill,
) -> Scores:
    """How many tokens of test answers the cloud completes as the model: all from rows as such, or filled; those that
    are asked for from rows as such, and at each point.
    """
    full_N = test.traces.top_NK[:, 0]

    def score(traces: Traces, here_N: Tensor, fill: Fill | None = None) -> Interval:
        return interval((completed(model, traces, depth, fill).chosen_N == full_N)[here_N].numpy())

    crossed = Crossing(model, test.traces, depth, codec)
    return {
        "test rows agreement": score(test.traces, test.decides_N),
        "test fill agreement": score(test.traces, test.decides_N, fill),
        "test fill of prompts agreement": score(test.traces, test.decides_N, replace(fill, prompts_only=True)),
        "test asked rows agreement": score(test.traces, asked_N),
        **{
            f"test point{index} agreement": score(crossed.at(point.context_rate, point.rate, asked_N)[0], asked_N)
            for index, point in enumerate(points)
        },
    }
