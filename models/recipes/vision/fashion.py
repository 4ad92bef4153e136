"""Fashion-MNIST: a small residual network in the cloud, three exits on the device. For tests and statistics.

60,000 greys of 28x28 -> FashionNet (trained here) --recipes.own--> three exits + bottleneck -> bundle

Xiao et al., "Fashion-MNIST" (2017); MIT licence. The Debian package `dataset-fashion-mnist` carries it.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.models.recipes.common import debian, origin
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision import export, own, own_data
from isthmus.models.recipes.vision.augment import random_affine, random_mirror
from isthmus.models.recipes.vision.cutting import capture
from isthmus.models.recipes.vision.own_data import Images
from isthmus.models.recipes.vision.own_training import normalised
from isthmus.models.recipes.vision.parts import halve
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.efficientnet_lite import fuse_batch_norms
from isthmus.models.vision.manifest import Preprocessing

PACKAGE = "dataset-fashion-mnist"
LABELS = (
    "T-shirt or top",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SIDE = 28
PREPROCESSING = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(0.286,) * 3, deviation=(0.353,) * 3)
CALIBRATION = 10_000  # the last of the training images
CUTS = ("first", "second", "third")
EPOCHS, BATCH, PEAK_LR, SMOOTHING = 9, 64, 2e-3, 0.1


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut. He et al., "Deep Residual Learning" (CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = (self.body(x_BCHW) + self.shortcut(x_BCHW)).relu()
        return y_BCHW


class FashionNet(nn.Module):
    """Images of 28x28 -> logits of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), Residual(24, 48, 2)
        )
        self.second = Residual(48, 64, 1)
        self.third = nn.Sequential(Residual(64, 96, 2), Residual(96, 96, 1))
        self.fourth = Residual(96, 128, 1)
        self.fifth = Residual(128, 128, 1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(128, len(LABELS)))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        features_BCHW = self.fifth(self.fourth(self.third(self.second(self.first(images_B3HW)))))
        logits_BK: Tensor = self.classifier(features_BCHW.mean((2, 3)))
        return logits_BK


def load(folder: Path) -> dict[str, Images]:
    """The three parts; 10,000 images each for calibration and test.

    Raises InvalidInput when they cannot be downloaded.
    """
    root = debian.fetch(PACKAGE, folder) / "usr" / "share" / "datasets" / "fashion-mnist"
    images_N3HW, labels_N = read(root, "train")
    return {
        "train": Images(images_N3HW[:-CALIBRATION], labels_N[:-CALIBRATION]),
        "calibration": Images(images_N3HW[-CALIBRATION:], labels_N[-CALIBRATION:]),
        "test": Images(*read(root, "t10k")),
    }


def read(root: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images as three equal channels, and their classes."""
    pixels = gzip.decompress((root / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((root / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    images_N1HW = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, SIDE, SIDE)
    labels_N = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return np.repeat(images_N1HW, 3, axis=1), labels_N


def train_cloud(run: Run, part: Images) -> FashionNet:
    """Train the cloud's network from random weights; returns it averaged, in eval mode."""
    torch.manual_seed(run.seed)
    assert part.labels_N is not None
    labels_N = torch.from_numpy(part.labels_N)

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(part), generator=generator)
        for start in range(0, len(part) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            images_B3HW = torch.from_numpy(part.images_N3HW[chosen.numpy()]).float() / 255
            images_B3HW = random_affine(random_mirror(images_B3HW, generator), generator)
            yield normalised(images_B3HW, PREPROCESSING), labels_N[chosen]

    def loss_of(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        images_B3HW, label_B = batch
        with torch.autocast("cpu", torch.bfloat16):
            logits_BK = net(images_B3HW).float()
        right = (logits_BK.argmax(1) == label_B).float().mean()
        return F.cross_entropy(logits_BK, label_B, label_smoothing=SMOOTHING), {"right": right.item()}

    net = FashionNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = run.fit("cloud", net, batches, loss_of, Schedule(EPOCHS, len(part) // BATCH, peak_lr=PEAK_LR))
    assert isinstance(average, FashionNet)
    return average


def measuring_data(folder: Path) -> export.Data:
    """The parts that nothing is trained on. Raises InvalidInput when they cannot be downloaded."""
    parts = load(folder)
    return export.Data(own_data.samples(parts["calibration"]), own_data.samples(parts["test"]))


def make(folder: Path, run: Run, command: str, data: Path) -> Bundle:
    """The whole recipe. Raises InvalidInput when the data cannot be downloaded. An interrupted run resumes."""
    parts = load(data)
    train = parts["train"]
    run = run.of(recipe="fashion", data=origin.of_arrays(train.images_N3HW, train.labels_N))
    net = fuse_batch_norms(train_cloud(run, train))
    halve(net)  # so that its graphs can be stored in float16 without loss
    captured = capture(net, (3, SIDE, SIDE))
    settings = own.Settings("fashion", "MIT (Fashion-MNIST)", PREPROCESSING, CUTS, task="garment")
    return own.build(folder, run, command, captured, parts, LABELS, "Fashion-MNIST, 50,000 labelled images", settings)
