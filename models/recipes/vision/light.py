"""The tap on the image: a slimmable copy of the cloud model's first blocks, then many rates.

views of the training part -> teacher's outputs, stored on disk
  -> slimming: the encoder at every width           (teacher's components alone, crops)
  -> bottleneck, rates, decoder                     (joint loss, a width a batch, all rates in each batch)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision.bottleneck import BottleneckModel, DistilBatch, batch_of, new_bottleneck, ramp
from isthmus.models.recipes.vision.components import Components, find_components, start, start_decoder
from isthmus.models.recipes.vision.distil import tail_points
from isthmus.models.recipes.vision.slimming import Slimming, random_crops, sorted_channels
from isthmus.models.recipes.vision.views import BATCH, Views, extend, make_views
from isthmus.models.vision.architecture import TapArchitecture
from isthmus.models.vision.efficientnet_lite import fuse_batch_norms
from isthmus.models.vision.slim import SlimEncoder, SlimFront
from isthmus.models.vision.split import SplitClassifier, repeated

SLIM_EPOCHS, BOTTLENECK_EPOCHS, RAMP_EPOCHS = 16, 14, 2
REFINE_EPOCHS = 10  # a second cosine cycle (SGDR, section 3): the bytes still fall when the first ends
WIDEST_SHARE = 0.6  # of the batches; the others use a narrower width
COMPONENT_PHOTOS = 256

Normalise = Callable[[Tensor], Tensor]  # grey images in [0, 1], BHW -> network input, B3HW


@dataclass(frozen=True)
class Teacher:
    """The split network, the normalisation of its images, and the annotators' probability of a defect of each photo."""

    split: SplitClassifier
    normalise: Normalise
    defect_N: NDArray[np.float32]


def teach(
    folder: Path, images_NHW: NDArray[np.uint8], split: SplitClassifier, normalise: Normalise, seed: int
) -> Views:
    """Views with the unsplit network's features after the last cut and in the tail, and its logits."""
    trunk = fuse_batch_norms(deepcopy(split.backbone.section(0, split.cuts[-1])).eval())
    tail = split.backbone.section(split.cuts[-1])

    def answers(grey_BHW: Tensor) -> Mapping[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            features_BCHW = trunk(normalise(grey_BHW))
            middle_BCHW, last_BCHW, logits_BK = tail_points(tail, features_BCHW)
        return {"features": features_BCHW, "middle": middle_BCHW, "last": last_BCHW, "logits": logits_BK}

    make_views(folder, images_NHW, seed)
    return extend(folder, "teacher", answers)


def components(views: Views, split: SplitClassifier, tap: TapArchitecture, normalise: Normalise) -> Components:
    """The components that the latent of a tap on the image represents, from the first view of some photographs."""
    some_BHW = torch.from_numpy(np.array(views.passes[0]["images"][:COMPONENT_PHOTOS])).float() / 255
    trunk, tail = (
        fuse_batch_norms(deepcopy(part).eval()).requires_grad_(False)
        for part in (split.backbone.section(0, tap.rejoin), split.backbone.section(tap.rejoin))
    )
    with torch.no_grad():
        features_NCHW = torch.cat([trunk(normalise(chunk_BHW)) for chunk_BHW in torch.split(some_BHW, BATCH)])
    return find_components(features_NCHW, tail, tap.latent_channels)


def slim(
    run: Run, views: Views, split: SplitClassifier, tap: TapArchitecture, requested: Components, normalise: Normalise
) -> SlimEncoder:
    """Distil the first blocks into a new encoder, at every width; returns it averaged, in eval mode."""
    torch.manual_seed(run.seed)
    some_BHW = torch.from_numpy(np.array(views.passes[0]["images"][: 2 * BATCH])).float() / 255
    ordered = sorted_channels(repeated(split.backbone, tap), normalise(some_BHW))
    encoder = SlimEncoder(ordered, tap.latent_channels, tap.widths)
    start(encoder, ordered, requested)
    module = Slimming(encoder, split.backbone.section(0, tap.rejoin), requested)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def crops(epoch: int, generator: torch.Generator) -> Iterator[Tensor]:
        for _, arrays in views.batches(generator, ["images"]):
            yield random_crops(normalise(arrays["images"]), generator)

    average = run.fit("slim", module, crops, module.loss, Schedule(SLIM_EPOCHS, len(views) // BATCH, peak_lr=1e-3))
    assert isinstance(average, Slimming)
    return average.encoder


def train_bottleneck(
    run: Run,
    stage: str,
    views: Views,
    teacher: Teacher,
    tap: TapArchitecture,
    encoder: SlimEncoder,
    requested: Components,
    per_kilobyte: tuple[float, ...],
) -> BottleneckModel:
    """Train bottleneck, rates and a new decoder after a trained front; returns them averaged, in eval mode.

    A single price in `per_kilobyte` trains one rate, at the widest width only.
    """
    torch.manual_seed(run.seed)
    module = new_bottleneck(teacher.split, tap, encoder.bottleneck, per_kilobyte, teacher.split.cuts[-1], settled=True)
    start_decoder(module.decoder, requested)
    module.free_tail()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    widest = len(encoder.widths) - 1

    def batches(epoch: int, generator: torch.Generator) -> Iterator[DistilBatch]:
        for indices, arrays in views.batches(generator):
            width = widest
            if len(per_kilobyte) > 1 and widest and torch.rand((), generator=generator) >= WIDEST_SHARE:
                width = int(torch.randint(widest, (), generator=generator))
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    arrays["front"] = encoder.front(teacher.normalise(arrays["images"]), width)
            batch = batch_of(arrays, "front", torch.from_numpy(teacher.defect_N[indices]))
            yield replace(batch, width=width, ramp=ramp(epoch, RAMP_EPOCHS))

    def refine_batches(epoch: int, generator: torch.Generator) -> Iterator[DistilBatch]:
        return batches(RAMP_EPOCHS, generator)

    steps = len(views) // BATCH
    average = run.fit(stage, module, batches, module.loss, Schedule(BOTTLENECK_EPOCHS, steps, peak_lr=1e-3))
    module.load_state_dict(average.state_dict())
    refine = Schedule(REFINE_EPOCHS, steps, peak_lr=6e-4)
    average = run.fit(f"{stage}-refine", module, refine_batches, module.loss, refine)
    assert isinstance(average, BottleneckModel)
    return average


def add_front(folder: Path, front: SlimFront, normalise: Normalise) -> Views:
    """Views with the widest front's features, the input of most batches of `train_bottleneck`."""

    def features(grey_BHW: Tensor) -> Mapping[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return {"front": front(normalise(grey_BHW), -1)}

    return extend(folder, "front", features)
