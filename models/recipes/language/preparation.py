"""Prepare the training of a handoff bundle: the model, its texts and the full model's outputs for them.

    self-generated chats, dictionaries --full model--> teacher outputs, cached in files

Every HELD_OUT-th sequence is held out from the training of exits, codec and KV fill.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from isthmus.models.errors import InvalidInput
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.language import corpus
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.teacher import TeacherOutputs, run_teacher

SHARES = (1 / 2, 2 / 3)  # default depths of exits, as shares of the layers
HELD_OUT = 20  # every HELD_OUT-th sequence is held out
FULL_PARTS = 3  # files of chats and of entries with hidden states of all depths, for closed forms


@dataclass(frozen=True)
class Prepared:
    """The inputs of all training steps.

    teacher: outputs for all texts, at the exits' depths. full: outputs for a few texts, at all depths that closed forms
    need.
    """

    run: Run
    checkpoint: Checkpoint
    model: Llama
    depths: tuple[int, ...]
    teacher: TeacherOutputs
    full: TeacherOutputs

    @property
    def depth(self) -> int:
        """The last exit's depth, where the cloud continues."""
        return self.depths[-1]

    @property
    def held_out(self) -> range:
        """Sequences that are held out."""
        return range(0, len(self.teacher), HELD_OUT)

    def answers(self, *, held_out: bool) -> list[int]:
        """Sequences with an answer that are held out, or that are not."""
        chosen = range(len(self.teacher))
        return [s for s in chosen if self.teacher.has_answer(s) and (s % HELD_OUT == 0) is held_out]


def exit_depths(config: LlamaConfig, chosen: Sequence[int] = ()) -> tuple[int, ...]:
    """Depths of the exits: `chosen`, or those at SHARES of the layers. Raises InvalidInput."""
    depths = tuple(sorted(set(chosen))) or tuple(round(share * config.layers) for share in SHARES)
    if not 0 < depths[0] <= depths[-1] < config.layers:
        raise InvalidInput(f"exits at depths {depths}, expected 1 to {config.layers - 1} layers")
    return depths


def open_checkpoint(source: str) -> Checkpoint:
    """Raises BundleError, and InvalidInput for a model with an output head of its own, which exits cannot share."""
    checkpoint = Checkpoint.open(source)
    if not checkpoint.config.tied:
        raise InvalidInput(f"{checkpoint.name}: its output head is not tied to the embedding, as exits need it")
    return checkpoint


def prepare(run: Run, checkpoint: Checkpoint, depths: tuple[int, ...]) -> Prepared:
    """Load the model, generate texts and run the model on them, as far as the run's folder lacks them.

    Raises InvalidInput when that folder is of another model or of other depths.
    """
    run = run.of(recipe="language", model=checkpoint.fingerprint.hex(), depths=" ".join(map(str, depths)))
    print("opening the model", file=sys.stderr)
    model = Llama.load(checkpoint)
    named = load_corpora(run, model, checkpoint)
    few = {name: each for name, each in named.items() if int(name.rpartition("-")[2]) < FULL_PARTS}
    full = teacher_outputs(run, model, few, sorted({*depths, *range(depths[-1], model.config.layers + 1)}), "full")
    return Prepared(run, checkpoint, model, depths, teacher_outputs(run, model, named, depths), full)


def load_corpora(run: Run, model: Llama, checkpoint: Checkpoint) -> dict[str, Corpus]:
    """All texts to learn from, by name."""
    entries = corpus.entries(run.folder)
    chats = corpus.chats(run.folder, model, checkpoint.tokenizer, entries, run.seed)
    running = corpus.split_parts(corpus.running_texts(entries, checkpoint.tokenizer, run.seed))
    named = {f"chats-{index:03}": each for index, each in enumerate(chats)}
    return {**named, **{f"entries-{index}": each for index, each in enumerate(running)}}


def teacher_outputs(
    run: Run,
    model: Llama,
    named: Mapping[str, Corpus],
    depths: Sequence[int],
    label: str = "teacher",
    dtype: torch.dtype = torch.bfloat16,
) -> TeacherOutputs:
    """The model's outputs for several corpora at some depths, cached in the run's folder, one file each."""
    parts = []
    for name, each in named.items():
        path = run.folder / f"{label}-{name}-{'-'.join(map(str, depths))}.pt"
        if not path.exists():
            outputs = run_teacher(model, each, depths, dtype)
            partial = path.with_suffix(".part")
            torch.save({field.name: getattr(outputs, field.name) for field in fields(TeacherOutputs)}, partial)
            partial.replace(path)
        parts.append(TeacherOutputs(**torch.load(path, weights_only=True, mmap=True)))
    return TeacherOutputs.concatenate(parts)
