"""`recipes split` of a network of any kind: where it is cut, the recipe of its kind, what to print of the bundle."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import own, own_answers, own_data, own_model
from isthmus.models.recipes.vision.cutting import Captured, cut_indices
from isthmus.models.recipes.vision.own_data import Images
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.inspect import exits_note, summary
from isthmus.models.vision.manifest import DEFAULT_EPSILON, Preprocessing

TASKS = {"classify": "class", "detect": "objects", "segment": "map", "embed": "embedding"}  # names by kind


@dataclass(frozen=True)
class Notes:
    """Lines about a finished bundle, and warnings."""

    lines: Sequence[str]
    warnings: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True)
class OwnSplit:
    """A captured network, a folder of images, and how they meet. `cuts`: proposed if empty."""

    captured: Captured
    data: own_data.Folder
    spec: Preprocessing
    cuts: tuple[str, ...]
    labels: Sequence[str]
    detection: own_model.Detection

    def __post_init__(self) -> None:
        """Raises InvalidInput for cuts that are none, before images are read."""
        cut_indices(self.captured, self.cuts)
        if removed := self.captured.removed:
            print(
                f"the model's {removed} is left out: answers are made of its logits, one for an image", file=sys.stderr
            )

    @cached_property
    def _parts(self) -> Mapping[str, Images]:
        return own_answers.images_of(self.data, self.spec)

    @cached_property
    def _measured(self) -> dict[str, float]:
        """Bytes by cut, of a network that answers no class and whose cut is not given."""
        if self.captured.kind == "classify" or self.cuts:
            return {}
        return own_answers.proposed(self.captured, self._parts["train"], self.spec)

    @cached_property
    def chosen(self) -> tuple[str, ...]:
        """The cuts."""
        if self.cuts or self.captured.kind == "classify":
            return self.cuts or own_model.proposed(self.captured)
        return (next(iter(self._measured)),)

    def table(self) -> list[str]:
        """Where the network can be cut, and where it is."""
        return own_model.table(self.captured, self.chosen, 3 * math.prod(self.spec.crop), self._measured)

    def make(self, out: Path, run: Run, command: str, about: Mapping[str, str]) -> tuple[Bundle, Notes]:
        """The bundle, in the folder `out`. Raises InvalidInput where network, images and labels do not fit."""
        kind = self.captured.kind
        if kind != "classify":
            task = own_model.task_of(self.captured, TASKS[kind], self.labels, self.detection)
            bundle = own_answers.make(
                out, run, command, self.captured, self._parts, self.chosen[-1], task, about, self.spec
            )
            return bundle, Notes(summary(bundle.manifest))
        settings = own.Settings(about["name"], about["licence"], self.spec, self.chosen)
        bundle, whole = own.make(out, run, command, self.captured, self.data, settings)
        lines = summary(bundle.manifest)
        for sent in whole:
            same = f"the model answers {sent.agreement:.1%} as the original"
            lines.append(f"a whole image as {sent.name}: {sent.mean_bytes:.0f} bytes, {same}")
        note = exits_note(bundle.manifest.heads["fp32"], DEFAULT_EPSILON)
        return bundle, Notes(lines, [note] if note else [])
