"""ELPV, end to end: fine-tune the cloud model, then distil exits and a bottleneck out of it, then write the bundle.

photographs -> EfficientNet-Lite2 (cloud) -> [frozen] -> exits + bottleneck (device) -> tables, thresholds -> bundle
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.bundle import Bundle
from models.manifest import Architecture, Preprocessing
from models.recipes import export
from models.recipes.augment import random_affine, random_contrast, random_dihedral
from models.recipes.distil import Distillation, Weights
from models.recipes.elpv_data import Photos, load
from models.recipes.imagenet import load_lite2
from models.recipes.trainer import Run, Schedule
from models.vision.efficientnet_lite import EfficientNetLite
from models.vision.split import SplitClassifier

CLOUD_SIZES = ((10, 224), (18, 300))  # (until epoch, pixels): progressive resizing, EfficientNetV2 section 4.3
REFINE_EPOCHS = 12  # a second cosine cycle at full size, SGDR section 3: the first ends before the loss does
BATCH = 16
MEAN, DEVIATION = 127 / 255, 128 / 255  # EfficientNet-Lite's own
PREPROCESSING = Preprocessing(resize=300, crop=(300, 300), mean=(MEAN,) * 3, deviation=(DEVIATION,) * 3)
LABELS = ("functional", "defective")
LICENCE = "CC BY-NC-SA 4.0 (trained on ELPV); ImageNet weights Apache-2.0"
PER_KILOBYTE = (3.0, 1.0, 0.3, 0.1)  # price of a coded kilobyte at each rate, in units of cross-entropy
ARCHITECTURE = Architecture(
    builder="split_classifier",
    backbone="efficientnet_lite2",
    classes=len(LABELS),
    cuts=(8, 12),
    latent_channels=16,
    decoder_channels=128,
    rates=len(PER_KILOBYTE),
)
MAX_PAYLOAD_BYTES = 4096
BRIDGE_EPOCHS, RAMP_EPOCHS, DECODER_EPOCHS, TAIL_EPOCHS = 14, 5, 3, 8


@dataclass(frozen=True)
class Batch:
    """Augmented photographs and the annotators' probability of a defect."""

    images_B3HW: Tensor
    defect_B: Tensor
    ramp: float = 1.0  # of the price of bytes


def normalise(images_BHW: Tensor) -> Tensor:
    """Grey values in [0, 1] -> what the network takes, B3HW, channels last."""
    grey_B1HW = ((images_BHW - MEAN) / DEVIATION).unsqueeze(1)
    return grey_B1HW.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def batches(photos: Photos, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch of augmented batches at `size` pixels, in random order; a last partial batch is left out."""
    order = torch.randperm(len(photos), generator=generator)
    for chosen in torch.split(order, BATCH):
        if len(chosen) < BATCH:
            return
        images_B1HW = torch.from_numpy(photos.images_NHW[chosen.numpy()]).float().div_(255).unsqueeze(1)
        images_B1HW = random_affine(random_dihedral(images_B1HW, generator), generator)
        if images_B1HW.shape[-1] != size:
            images_B1HW = F.interpolate(images_B1HW, size=(size, size), mode="bilinear", antialias=True)
        images_B1HW = random_contrast(images_B1HW, generator)
        yield Batch(normalise(images_B1HW[:, 0]), torch.from_numpy(photos.defect_N[chosen.numpy()]))


def soft_cross_entropy(logits_B2: Tensor, defect_B: Tensor) -> Tensor:
    """Cross-entropy against the annotators' doubt (0, 1/3, 2/3, 1) in place of a hard label."""
    log_p_B2 = logits_B2.float().log_softmax(1)
    return -(defect_B * log_p_B2[:, 1] + (1 - defect_B) * log_p_B2[:, 0]).mean()


def train_cloud(run: Run, photos: Photos) -> EfficientNetLite:
    """Fine-tune EfficientNet-Lite2 from ImageNet weights in two cycles; returns the averaged network in eval mode."""
    torch.manual_seed(run.seed)
    net = EfficientNetLite("efficientnet_lite2", classes=2, dropout=0.3)
    load_lite2(net)
    net.set_drop_path(0.1)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        size = next(pixels for until, pixels in CLOUD_SIZES if epoch < until)
        return batches(photos, size, generator)

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            logits_B2 = net(batch.images_B3HW)
        right = (logits_B2.argmax(1) == (batch.defect_B >= 0.5)).float().mean()
        return soft_cross_entropy(logits_B2, batch.defect_B), {"right": right.item()}

    def refine_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(photos, PREPROCESSING.crop[0], generator)

    steps = len(photos) // BATCH
    average = run.fit("cloud", net, epoch_batches, loss_of, Schedule(CLOUD_SIZES[-1][0], steps, peak_lr=5e-4))
    net.load_state_dict(average.state_dict())
    average = run.fit("refine", net, refine_batches, loss_of, Schedule(REFINE_EPOCHS, steps, peak_lr=3e-4))
    assert isinstance(average, EfficientNetLite)
    return average


def train_bridge(run: Run, photos: Photos, cloud: EfficientNetLite) -> Distillation:
    """Distil exits and bottleneck out of the cloud model, in three stages; returns the averaged module."""
    torch.manual_seed(run.seed)
    split = SplitClassifier(ARCHITECTURE)
    split.backbone.load_state_dict(cloud.state_dict())
    module = Distillation(split, ARCHITECTURE.latent_channels, Weights(PER_KILOBYTE))
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def bridge_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        for batch in batches(photos, PREPROCESSING.crop[0], generator):
            yield replace(batch, ramp=min(epoch / RAMP_EPOCHS, 1.0))

    def decoder_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        return batches(photos, PREPROCESSING.crop[0], generator)

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        target_B2 = torch.stack([1 - batch.defect_B, batch.defect_B], 1)
        return module.loss(batch.images_B3HW, target_B2, batch.ramp)

    steps = len(photos) // BATCH
    average = run.fit("bridge", module, bridge_batches, loss_of, Schedule(BRIDGE_EPOCHS, steps, peak_lr=2e-3))
    module.load_state_dict(average.state_dict())
    module.freeze_encoder()
    average = run.fit("decoder", module, decoder_batches, loss_of, Schedule(DECODER_EPOCHS, steps, peak_lr=5e-4))
    module.load_state_dict(average.state_dict())
    module.free_tail()
    average = run.fit("tail", module, decoder_batches, loss_of, Schedule(TAIL_EPOCHS, steps, peak_lr=2e-4))
    assert isinstance(average, Distillation)
    return average


def samples(photos: Photos) -> export.Samples:
    """Photographs as the device's preprocessing gives them."""
    images = [
        np.ascontiguousarray(
            np.broadcast_to((grey_HW.astype(np.float32) / 255 - MEAN) / DEVIATION, (3, *grey_HW.shape))
        )
        for grey_HW in photos.images_NHW
    ]
    return export.Samples([image.astype(np.float32) for image in images], photos.labels_N)


def make(folder: Path, run: Run, command: str) -> Bundle:
    """The whole recipe. Raises nothing of its own; interrupted, it goes on where its last epoch ended."""
    train = load("train")
    cloud = train_cloud(run, train)
    module = train_bridge(run, train, cloud)
    trained = export.Trained(module.split, module.tables(), ARCHITECTURE, PREPROCESSING, MAX_PAYLOAD_BYTES)
    return export.write(
        folder,
        trained,
        about={"name": "elpv", "labels": LABELS, "licence": LICENCE},
        training={
            "command": command,
            "seed": run.seed,
            "seconds": run.seconds(),
            "data": f"ELPV (PyPI elpv-dataset), train part, {len(train)} photographs",
        },
        calibration=samples(load("calibration")),
        test=samples(load("test")),
    )
