"""A real vision bundle, small and untrained: two taps (one of them with two widths of its encoder), two tasks.

Random weights; figures in its manifest are made up.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from isthmus.models.bundle.files import write_bundle
from isthmus.models.codecs.checkerboard import Tables
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.vision.parts import Parts, Trained, TrainedTap, halve, head_parts
from isthmus.models.vision.architecture import Architecture, TapArchitecture
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.certificates import dependencies
from isthmus.models.vision.manifest import Manifest, Preprocessing
from isthmus.models.vision.split import SplitClassifier
from isthmus.models.vision.tasks import ClassifyTask

SIDE = 64
TASKS = (("defect", ("good", "bad")), ("colour", ("red", "green", "blue")))
TAPS = ("light", "deep")
TINY = Architecture(
    builder="split_classifier",
    backbone="efficientnet_lite0",
    classes=(2, 3),
    cuts=(2, 6),
    taps=(
        TapArchitecture(
            after=0,
            blocks=4,
            rejoin=5,
            own_tail=True,
            latent_channels=3,
            decoder_channels=16,
            rates=3,
            widths=(0.5, 1.0),
        ),
        TapArchitecture(after=2, latent_channels=4, decoder_channels=16, rates=2),
    ),
)
PREPROCESSING = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5))
GAINS = (1.0, 3.0, 6.0)  # of the rates of a tap
IMAGES = (
    ("jpeg", 50, 1500.0, 0.9),
    ("jpeg", 75, 2200.0, 0.98),
    ("webp", 75, 1800.0, 0.97),
    ("png", 100, 12_000.0, 1.0),
)
CAP = 4096  # bytes of a payload

Floats = NDArray[np.float32]


def random_images(count: int, seed: int) -> list[Floats]:
    """Smooth random images (3, SIDE, SIDE) as the preprocessing gives them."""
    coarse = np.random.default_rng(seed).uniform(-1, 1, (count, 3, SIDE // 8, SIDE // 8)).astype(np.float32)
    return [image_CHW.repeat(8, axis=1).repeat(8, axis=2) for image_CHW in coarse]


def laplace_tables(channels: int, gains: tuple[float, ...]) -> Tables:
    """Tables fitted to rounded Laplace noise, a few integers wide."""
    rng = np.random.default_rng(0)
    integers = [np.rint(rng.laplace(0, 1.5, (64, channels, 8, 8))).clip(-20, 20) for _ in gains]
    gains_RC = np.repeat(np.array(gains, np.float32)[:, None], channels, axis=1)
    return fit([rate_NCHW.astype(np.int32) for rate_NCHW in integers], gains_RC)


def random_split() -> SplitClassifier:
    """EfficientNet-Lite0 with seeded random weights and batch-norm statistics of random images, in eval mode."""
    torch.manual_seed(0)
    split = SplitClassifier(TINY)
    for norm in (module for module in split.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    for matrix in (parameter for parameter in split.parameters() if parameter.ndim > 1 and not parameter.any()):
        nn.init.normal_(matrix, std=0.2)  # training starts from rates that are all alike
    with torch.no_grad():
        images_B3HW = torch.rand(8, 3, SIDE, SIDE) * 2 - 1
        early_BCHW = split.train().segment(0, images_B3HW)
        late_BCHW = split.segment(1, early_BCHW)
        split.exits[0](early_BCHW)
        split.exits[1](late_BCHW)
        for width in range(2):
            light_BCHW = split.taps[0].encoder(images_B3HW, width)
        for tap, latent_BCHW in enumerate((light_BCHW, split.taps[1].encoder(late_BCHW))):
            split.tail(split.decode(tap, latent_BCHW, torch.arange(8) % 2))
        for task in range(len(TASKS)):
            split.answer(late_BCHW, task)
    return split.eval()


def write_tiny_bundle(folder: Path, split: SplitClassifier) -> Bundle:
    """2 + 3 labels, 64x64 photos, 2 exits; latents (3, 8, 8) of the image and (4, 8, 8) after the last segment."""
    split = copy.deepcopy(split)
    weights = halve(split)
    trained_taps = (
        TrainedTap(name, laplace_tables(built.latent_channels, GAINS[: built.rates]), CAP)
        for name, built in zip(TAPS, TINY.taps, strict=True)
    )
    tasks = tuple(ClassifyTask(name=name, labels=labels) for name, labels in TASKS)
    ranges = random_images(4, seed=9)
    parts = head_parts(Trained(split, tuple(trained_taps), tasks, TINY, PREPROCESSING, ranges))
    files = {**parts.files, "weights.safetensors": safetensors.torch.save(weights)}
    content = manifest_of(parts)
    draft = Bundle.open(write_bundle(folder, content, files, Manifest)).manifest
    for precision, head in content["heads"].items():
        head["depends_on"] = dependencies(draft, precision).model_dump()  # so that its certificates hold
    return Bundle.open(write_bundle(folder, content, files, Manifest))


def manifest_of(parts: Parts) -> dict[str, Any]:
    """A manifest for `write_bundle`. The wider and the richer, the more agreement and the more bytes."""
    for segment in parts.segments:
        segment["macs"] = 10_000_000
    for tap, built in zip(parts.taps, TINY.taps, strict=True):
        tap["tail_macs"] = 30_000_000
        tap["widths"] = [
            {"width": width, "encoder_macs": int(8_000_000 * width), "rates": rates_of(built.rates, width)}
            for width in built.widths
        ]
    exits = [{"name": f"exit{index}", "accuracy": 0.7, "agreement": 0.8} for index in range(len(parts.segments))]
    confidences = {"fp32": (0.99, 0.97), "int8": (0.98, 0.96)}
    thresholds = {
        precision: [certificate(e, (c, round(c - 0.01, 2))) for e, c in zip((0.005, 0.02), sure, strict=True)]
        for precision, sure in confidences.items()
    }
    return {
        "name": "tiny",
        "licence": "none: random weights",
        "tasks": [{"name": name, "labels": list(labels)} for name, labels in TASKS],
        "preprocessing": PREPROCESSING.model_dump(mode="json"),
        "architecture": TINY.model_dump(mode="json"),
        "weights": "weights.safetensors",
        "segments": parts.segments,
        "heads": {
            precision: {
                "files": names,
                "exits": exits,
                "thresholds": thresholds[precision],
                "depends_on": depends_on(precision),
            }
            for precision, names in parts.heads.items()
        },
        "taps": parts.taps,
        "images": [
            {"form": form, "quality": quality, "mean_bytes": size, "accuracy": 0.8, "agreement": agreement}
            for form, quality, size, agreement in IMAGES
        ],
        "calibration_samples": 300,
        "tail_macs": 20_000_000,
        "training": {
            "command": "tests/tiny_bundle.py",
            "seed": 0,
            "seconds": 0.0,
            "data": "none",
            "machine": "any",
            "versions": {},
        },
        "units": {},
        "scores": {"test cloud accuracy": {"value": 0.75, "low": 0.5, "high": 0.9, "samples": 20}},
    }


def certificate(epsilon: float, confidences: tuple[float, ...]) -> dict[str, Any]:
    """A certificate about accuracy among all inputs, of which half exit."""
    count = len(confidences)
    return {
        "promise": "accuracy", "among": "all", "epsilon": epsilon, "delta": 0.1, "confidences": list(confidences),
        "shares": [0.5 / count] * count, "accuracy": 0.9, "agreement": 0.95, "loss": 0.0, "samples": 300,
    }  # fmt: skip


def depends_on(precision: str) -> dict[str, str]:
    """Dependencies of no meaning."""
    parts = {"graphs": "0" * 64, "cloud": "1" * 64, "preprocessing": "2" * 64}
    return {**parts, "precision": precision, "runtime": "onnxruntime 1.0"}


def rates_of(count: int, width: float) -> list[dict[str, Any]]:
    return [
        {
            "mean_bytes": 40.0 + 40 * rate,
            "max_bytes": 200,
            "accuracy": 0.8,
            "agreement": round(0.93 + 0.02 * width + 0.01 * rate, 3),
        }
        for rate in range(count)
    ]
