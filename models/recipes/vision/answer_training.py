"""The bottleneck of a network that answers no class: from views of photographs to a trained encoder with its tables.

views -> trunk (frozen), once -> maps -> components -> distillation (`answer_distil`) -> integer tables
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isthmus.models.codecs.checkerboard import Tables, from_tensors, to_tensors
from isthmus.models.messages import TaskKind
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision.answer_distil import AnswerDistillation, MapBatch, MapEncoder, information
from isthmus.models.recipes.vision.bottleneck import ramp
from isthmus.models.recipes.vision.components import components_of, start_decoder
from isthmus.models.recipes.vision.own_training import normalised
from isthmus.models.recipes.vision.rates import Rates, integers
from isthmus.models.recipes.vision.views import BATCH, Views, extend
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.split import DenseDecoder

COMPONENT_VIEWS = 128
STAGE = "bottleneck"  # of the training
MAP = "map"  # the views' array of what crosses
PEAK_LR = 1e-3


@dataclass(frozen=True)
class Plan:
    """Sizes of a bottleneck, and how long it is trained. per_kilobyte: price at each rate, in units of the loss."""

    latent: int
    decoder: int
    per_kilobyte: tuple[float, ...]
    log_gains: tuple[float, float]  # initial, of the highest and the lowest price
    epochs: int
    ramp_epochs: int


@dataclass(frozen=True)
class Halves:
    """A network before and after its cut, one map between them."""

    kind: TaskKind
    trunk: nn.Module
    rest: nn.Module
    channels: int  # of the map


class BottleneckRun:
    """The training of one bottleneck: what it is made from, and the files that it keeps."""

    def __init__(
        self, run: Run, halves: Halves, plan: Plan, draw: Callable[[Path], Views], spec: Preprocessing
    ) -> None:
        """`draw` makes the views below a folder, where they are not there yet."""
        self.run, self.halves, self.plan, self._draw, self._spec = run, halves, plan, draw, spec

    def views(self) -> Views:
        """The views of the photographs with what crosses, computed once."""
        folder = self.run.folder / "views"
        self._draw(folder)
        trunk = self.halves.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def maps(images_B3HW: Tensor) -> Mapping[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                found_BCHW = trunk(normalised(images_B3HW, self._spec))
            return {MAP: found_BCHW.float()}

        return extend(folder, "trunk", maps)

    def new(self) -> AnswerDistillation:
        """Untrained."""
        plan, channels = self.plan, self.halves.channels
        return AnswerDistillation(
            self.halves.kind,
            MapEncoder(channels, plan.latent),
            Rates(plan.latent, plan.per_kilobyte, lr_scale=10.0, log_gains=plan.log_gains, hard=True),
            DenseDecoder(plan.latent, channels, plan.decoder, len(plan.per_kilobyte)),
            self.halves.rest,
        )

    def train(self) -> AnswerDistillation:
        """Encoder, rates and decoder, averaged, in eval mode; writes the tables too.

        An interrupted run resumes after its last epoch.
        """
        views = self.views()
        torch.manual_seed(self.run.seed)
        module = self.new()
        self.started(module, lambda: views)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def batches(epoch: int, generator: torch.Generator) -> Iterator[MapBatch]:
            for _, arrays in views.batches(generator, [MAP]):
                yield MapBatch(arrays[MAP], ramp(epoch, self.plan.ramp_epochs))

        schedule = Schedule(self.plan.epochs, len(views) // BATCH, peak_lr=PEAK_LR)
        average = self.run.fit(STAGE, module, batches, module.loss, schedule)
        assert isinstance(average, AnswerDistillation)
        self.write_tables(average, views)
        return average

    def started(self, module: AnswerDistillation, views: Callable[[], Views]) -> Path:
        """Initialise encoder and decoder with the components of some views' maps; the file that keeps them."""
        file = self.run.folder / "start.safetensors"
        if not file.exists():
            begun = time.monotonic()
            self._start(module, views())
            self.run.record("start", time.monotonic() - begun)
            partial = file.with_suffix(".part")
            save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, partial)
            partial.replace(file)
        module.load_state_dict(load_file(file))
        return file

    def _start(self, module: AnswerDistillation, views: Views) -> None:
        step = max(1, len(views) // COMPONENT_VIEWS)
        map_NCHW = torch.from_numpy(np.array(views.passes[-1][MAP][::step])).float()
        found = components_of(map_NCHW, information(module.kind, map_NCHW, module.heads), self.plan.latent)
        module.encoder.start(found)
        start_decoder(module.decoder, found)

    def load(self) -> tuple[AnswerDistillation, Tables]:
        """The bottleneck that the run has reached, in eval mode, with its tables."""
        module = self.new()
        reached = self.run.checkpoint(STAGE)
        if reached.exists():
            self.run.load_average(STAGE, module)
        else:
            reached = self.started(module, self.views)
        module.eval()
        written = self._tables
        if not written.exists() or written.stat().st_mtime < reached.stat().st_mtime:
            self.write_tables(module, self.views())
        arrays = {name: tensor.numpy() for name, tensor in load_file(written).items()}
        return module, from_tensors(arrays, len(self.plan.per_kilobyte))

    def write_tables(self, module: AnswerDistillation, views: Views) -> None:
        """Fit the tables of a bottleneck, to the first views, and write them beside its checkpoint."""

        def latent(maps_BCHW: Tensor) -> Tensor:
            found_BCHW: Tensor = module.encoder(maps_BCHW)
            return found_BCHW

        sent = integers(views.passes[0][MAP], latent, module.rates)
        found = to_tensors(fit(sent, module.rates.gains_RC))
        save_file({name: torch.from_numpy(array) for name, array in found.items()}, self._tables)

    @property
    def _tables(self) -> Path:
        return self.run.folder / "tables.safetensors"
