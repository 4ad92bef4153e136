"""Exits, hidden states and KV fill of a language model, all else left as it is -> a hand-off bundle.

    chats with itself, dictionaries --full model--> traces --distil--> exits --held out--> judges
                                                          --components--> states    --ridge--> KV fill

A twentieth of the sequences is held out: judges learn on one half of it, and thresholds are measured on the other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from models.errors import InvalidInput
from models.language.checkpoint import Checkpoint
from models.recipes import language_text
from models.recipes.language_exits import Exit, Traces, start, trace, train
from models.recipes.language_text import Texts
from models.recipes.llama import Llama
from models.recipes.trainer import Run

DEPTHS = (1 / 2, 2 / 3)  # of the layers, where exits are
HELD_OUT = 20  # every so manyth sequence
FULL_CHUNKS = 3  # of chats, whose rows of all depths are kept: for what is found in closed form


def depths(model: Llama) -> tuple[int, ...]:
    return tuple(round(share * model.config.layers) for share in DEPTHS)


def texts(run: Run, model: Llama, checkpoint: Checkpoint) -> dict[str, Texts]:
    """All sequences to learn from, by name; made where they are not there yet."""
    entries = language_text.entries(run.folder)
    found = language_text.chats(run.folder, model, checkpoint.tokenizer, entries, run.seed)
    named = {f"chats-{index:03}": each for index, each in enumerate(found)}
    plain = language_text.plain_texts(entries, checkpoint.tokenizer, run.seed)
    return {**named, **{f"entries-{index}": each for index, each in enumerate(language_text.parted(plain))}}


def traces(run: Run, model: Llama, named: dict[str, Texts], wanted: Sequence[int], label: str = "trace") -> Traces:
    """What the model makes of all of them, at the wanted depths; kept on disk, file by file."""
    found = []
    for name, each in named.items():
        path = run.folder / f"{label}-{name}.pt"
        if not path.exists():
            made = trace(model, each, wanted)
            torch.save({field.name: getattr(made, field.name) for field in fields(Traces)}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        found.append(Traces(**torch.load(path, weights_only=True)))
    return Traces.joined(found)


def exit_at(run: Run, model: Llama, depth: int, learnt: Traces, full: Traces) -> Exit:
    """A trained exit; a run that was interrupted goes on."""
    torch.manual_seed(run.seed)
    exit_ = Exit(model.config, depth)
    start(exit_, model, full, depth)
    chosen = [index for index in range(len(learnt)) if index % HELD_OUT]
    return train(run, exit_, model, learnt, chosen)


def prepare(run: Run, source: str) -> tuple[Checkpoint, Llama, Traces, Traces]:
    """Model and traces: those to learn from, and a few of all depths."""
    run.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(source)
    if not checkpoint.config.tied:
        raise InvalidInput(f"{checkpoint.name}: its output head is not its embedding, which exits here share")
    print("opening the model", file=sys.stderr)
    model = Llama.load(checkpoint)
    named = texts(run, model, checkpoint)
    first, last = depths(model)[0], model.config.layers
    few = {name: named[name] for name in list(named)[:FULL_CHUNKS]}
    full = traces(run, model, few, [first, *range(depths(model)[-1], last + 1)], "full")
    return checkpoint, model, traces(run, model, named, depths(model)), full


def only_exit(work: Path, seed: int, source: str, depth: int) -> None:
    """Train one exit alone, so that several can be trained side by side."""
    run = Run(work, seed)
    _, model, learnt, full = prepare(run, source)
    if depth not in depths(model):
        raise InvalidInput(f"there is no exit at depth {depth}, exits are at {depths(model)}")
    exit_at(run, model, depth, learnt, full)
