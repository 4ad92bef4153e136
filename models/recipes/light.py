"""The tap behind the image: a slimmable copy of the cloud model's first blocks, then a bottleneck at many rates.

views of the training part -> teacher's answers, kept on disk
  -> slimming: the first blocks at every width      (features alone, crops)
  -> bridge: bottleneck, rates, decoder             (joint loss, a width a batch, all rates in each batch)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.recipes.bridge import Batch, Bridge, Weights, batch_of, ramp
from models.recipes.distil import tail_points
from models.recipes.rates import Rates
from models.recipes.slimming import Slimming, random_crops, sorted_channels
from models.recipes.trainer import Run, Schedule
from models.recipes.views import BATCH, Views, extend, make_views
from models.vision.efficientnet_lite import fuse_batch_norms
from models.vision.slim import SlimBottleneck, SlimEncoder, SlimFront
from models.vision.split import DenseDecoder, SplitClassifier

SLIM_EPOCHS, BRIDGE_EPOCHS, RAMP_EPOCHS = 10, 11, 3
WIDEST_SHARE = 0.5  # of the batches; the others take a narrower width

Normalise = Callable[[Tensor], Tensor]  # grey images in [0, 1], BHW -> what the network takes, B3HW


def teach(
    folder: Path, images_NHW: NDArray[np.uint8], split: SplitClassifier, normalise: Normalise, seed: int
) -> Views:
    """Views with the unsplit network's features behind the last cut, in the tail, and its logits."""
    trunk = fuse_batch_norms(deepcopy(split.backbone.section(0, split.cuts[-1])).eval())
    tail = split.backbone.section(split.cuts[-1])

    def answers(grey_BHW: Tensor) -> Mapping[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            features_BCHW = trunk(normalise(grey_BHW))
            middle_BCHW, last_BCHW, logits_BK = tail_points(tail, features_BCHW)
        return {"features": features_BCHW, "middle": middle_BCHW, "last": last_BCHW, "logits": logits_BK}

    make_views(folder, images_NHW, seed)
    return extend(folder, "teacher", answers)


def slim(
    run: Run, views: Views, split: SplitClassifier, encoder: SlimEncoder, rejoin: int, normalise: Normalise
) -> SlimFront:
    """Distil the first blocks into every width of the encoder's front; returns it averaged, in eval mode.

    The bottleneck starts as the block before `rejoin`, which has the same stride.
    """
    torch.manual_seed(run.seed)
    blocks = list(split.backbone.blocks)
    some_BHW = torch.from_numpy(np.array(views.passes[0]["images"][: 2 * BATCH])).float() / 255
    count = len(encoder.front.blocks)
    ordered = sorted_channels(nn.Sequential(*blocks[:count], blocks[rejoin - 1]), normalise(some_BHW))
    encoder.bottleneck.load(ordered[-1])
    module = Slimming(encoder.front, encoder.widths, nn.Sequential(*list(ordered)[:-1]))
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def crops(epoch: int, generator: torch.Generator) -> Iterator[Tensor]:
        for _, arrays in views.batches(generator, ["images"]):
            yield random_crops(normalise(arrays["images"]), generator)

    average = run.fit("slim", module, crops, module.loss, Schedule(SLIM_EPOCHS, len(views) // BATCH, peak_lr=1e-3))
    assert isinstance(average, Slimming)
    return average.front


def bridge(
    run: Run,
    views: Views,
    defect_N: NDArray[np.float32],
    split: SplitClassifier,
    tap: int,
    normalise: Normalise,
    per_kilobyte: tuple[float, ...],
) -> Bridge:
    """Train bottleneck, rates and decoder behind the finished front of a tap; returns them averaged, in eval mode."""
    torch.manual_seed(run.seed)
    light = split.tap(tap)
    encoder = light.slim
    assert isinstance(light.decoder, DenseDecoder)
    some_BCHW = torch.from_numpy(np.array(views.passes[0]["front"][: 8 * BATCH])).float()
    start_from_components(encoder.bottleneck.eval(), light.decoder, some_BCHW)
    module = Bridge(
        encoder.bottleneck,
        Rates(light.latent_channels, per_kilobyte, lr_scale=10.0, log_gains=(-1.2, 0.6)),
        light.decoder,
        split.backbone.section(light.rejoin),
        split.cuts[-1] - light.rejoin,
        Weights(),
    )
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    widest = len(encoder.widths) - 1

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        for indices, arrays in views.batches(generator):
            width = widest
            if widest and torch.rand((), generator=generator) >= WIDEST_SHARE:
                width = int(torch.randint(widest, (), generator=generator))
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    arrays["front"] = encoder.front(normalise(arrays["images"]), width)
            batch = batch_of(arrays, "front", torch.from_numpy(defect_N[indices]))
            yield replace(batch, width=width, ramp=ramp(epoch, RAMP_EPOCHS))

    schedule = Schedule(BRIDGE_EPOCHS, len(views) // BATCH, peak_lr=1e-3)
    average = run.fit("light", module, batches, module.loss, schedule)
    assert isinstance(average, Bridge)
    return average


@torch.no_grad()
def start_from_components(bottleneck: SlimBottleneck, decoder: DenseDecoder, front_BCHW: Tensor) -> None:
    """Projection and linear decoder as principal components of what the bottleneck would give without them.

    The features that the tail needs are nearly all in a few components, and a start from chance does not find them
    within a dozen epochs.
    """
    widest = len(bottleneck.project.norms) - 1
    features_BCHW = bottleneck.squeeze(front_BCHW, widest)
    mean_C = features_BCHW.mean((0, 2, 3))
    centred_CN = (features_BCHW - mean_C[:, None, None]).transpose(0, 1).flatten(1)
    _, vectors_CC = torch.linalg.eigh(centred_CN @ centred_CN.T)
    latent = decoder.linear.in_channels
    components_CL = vectors_CC.flip(1)[:, :latent]
    scale = centred_CN.std()
    bottleneck.project.weight.copy_(components_CL.T[:, :, None, None])
    deviation_L = (components_CL.T @ centred_CN).std(1)
    for norm in bottleneck.project.norms:
        assert isinstance(norm, nn.BatchNorm2d)
        norm.running_mean.copy_(components_CL.T @ mean_C)  # type: ignore[union-attr]
        norm.running_var.copy_(deviation_L.square())  # type: ignore[union-attr]
        norm.weight.copy_(deviation_L / scale)
        nn.init.zeros_(norm.bias)
    decoder.linear.weight.copy_((components_CL * scale)[:, :, None, None])
    decoder.linear.bias.copy_(mean_C)  # type: ignore[union-attr]


def add_front(folder: Path, front: SlimFront, normalise: Normalise) -> Views:
    """Views with the widest front's features: what most batches of `bridge` start from."""

    def features(grey_BHW: Tensor) -> Mapping[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return {"front": front(normalise(grey_BHW), -1)}

    return extend(folder, "front", features)
