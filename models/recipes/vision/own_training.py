"""Training exits and a bottleneck on a user's own images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision.augment import random_affine, random_contrast
from isthmus.models.recipes.vision.components import find_components, start_decoder, start_projection
from isthmus.models.recipes.vision.distil import Distillation, train_in_stages
from isthmus.models.recipes.vision.own_data import Images, normalise
from isthmus.models.recipes.vision.views import BATCH
from isthmus.models.vision.manifest import Preprocessing
from isthmus.models.vision.split import SplitClassifier

BOTTLENECK_EPOCHS, RAMP_EPOCHS, DECODER_EPOCHS, TAIL_EPOCHS = 10, 4, 2, 4
ENOUGH_STEPS, MAX_REPEATS = (
    2500,
    3,
)  # of the bottleneck's training; with few images, epochs are multiplied up to MAX_REPEATS
COMPONENT_IMAGES = 256
EPOCH_IMAGES = 8192  # at most; of a larger folder an epoch uses a random part


def batches(part: Images, targets_NK: Tensor, spec: Preprocessing, generator: torch.Generator) -> Iterator[ImageBatch]:
    """One epoch of augmented batches in random order, without a last partial batch."""
    order = torch.randperm(len(part), generator=generator)[:EPOCH_IMAGES]
    for start in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        images_B3HW = torch.from_numpy(part.images_N3HW[chosen.numpy()]).float().div_(255)
        images_B3HW = random_contrast(random_affine(images_B3HW, generator), generator)
        yield ImageBatch(normalised(images_B3HW, spec), targets_NK[chosen])


@dataclass(frozen=True)
class ImageBatch:
    """Augmented images and their target probabilities."""

    images_B3HW: Tensor
    target_BK: Tensor
    ramp: float = 1.0  # factor of the price of bytes


def normalised(images_B3HW: Tensor, spec: Preprocessing) -> Tensor:
    """Values in [0, 1] -> network input, channels last."""
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (spec.mean, spec.deviation))
    return ((images_B3HW - mean) / deviation).contiguous(memory_format=torch.channels_last)


def train(run: Run, module: Distillation, part: Images, targets_NK: Tensor, spec: Preprocessing) -> Distillation:
    """Bottleneck and exits, then the decoder, then the tap's own tail; returns them averaged, in eval mode."""

    def loss_of(batch: ImageBatch) -> tuple[Tensor, dict[str, float]]:
        return module.loss(batch.images_B3HW, batch.target_BK, batch.ramp)

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[ImageBatch]:
        return batches(part, targets_NK, spec, generator)

    def ramped_batches(epoch: int, generator: torch.Generator) -> Iterator[ImageBatch]:
        for batch in batches(part, targets_NK, spec, generator):
            yield ImageBatch(batch.images_B3HW, batch.target_BK, min(epoch / RAMP_EPOCHS, 1.0))

    times = repeats(part)
    epochs = (times * BOTTLENECK_EPOCHS, times * DECODER_EPOCHS, times * TAIL_EPOCHS)
    return train_in_stages(run, module, ramped_batches, epoch_batches, loss_of, epochs, steps_of(part))


def start(split: SplitClassifier, part: Images, spec: Preprocessing) -> None:
    """Initialise the bottleneck with components of the features after the last cut (`recipes.vision.components`)."""
    chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:COMPONENT_IMAGES].numpy()
    images_N3HW = torch.from_numpy(normalise(part.images_N3HW[chosen], spec))
    with torch.no_grad():
        features_NCHW = torch.cat([split.trunk(chunk_B3HW) for chunk_B3HW in torch.split(images_N3HW, BATCH)])
    rest = split.backbone.section(split.cuts[-1]).requires_grad_(False)
    tap = split.tap(0)
    found = find_components(features_NCHW, rest, tap.latent_channels)
    start_projection(tap.encoder, found)
    start_decoder(tap.decoder, found)


def steps_of(part: Images) -> int:
    """Batches of an epoch."""
    return min(len(part), EPOCH_IMAGES) // BATCH


def repeats(part: Images) -> int:
    """Factor of the number of epochs, larger for few images."""
    return min(max(round(ENOUGH_STEPS / (BOTTLENECK_EPOCHS * max(steps_of(part), 1))), 1), MAX_REPEATS)


def seconds_left(module: Distillation, part: Images, targets_NK: Tensor, spec: Preprocessing) -> float:
    """Estimated duration of `train` in seconds, from two steps."""
    each = []
    for batch, _ in zip(batches(part, targets_NK, spec, torch.Generator().manual_seed(0)), range(2), strict=False):
        started_s = time.perf_counter()
        module.train().loss(batch.images_B3HW, batch.target_BK)[0].backward()  # type: ignore[no-untyped-call]
        each.append(time.perf_counter() - started_s)
    module.zero_grad()
    return each[-1] * steps_of(part) * repeats(part) * (BOTTLENECK_EPOCHS + DECODER_EPOCHS + TAIL_EPOCHS)


def answers(split: SplitClassifier, part: Images, spec: Preprocessing) -> Tensor:
    """The classes that the model predicts, (N,)."""
    with torch.inference_mode():
        return torch.cat(
            [
                split(torch.from_numpy(normalise(part.images_N3HW[start : start + BATCH], spec))).argmax(1)
                for start in range(0, len(part), BATCH)
            ]
        )
