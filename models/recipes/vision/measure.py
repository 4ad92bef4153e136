"""Accuracy and bytes of a bundle as it runs: ONNX Runtime's head, the entropy coder's real bytes, the loaded tail."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from isthmus.models.bundle.manifest import Interval
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.vision.calibrate import Answers, calibrate
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.graph_tail import probabilities
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import encode_whole, open_image, preprocess
from isthmus.models.vision.manifest import Exit, ImageForm, Manifest, Precision
from isthmus.models.vision.tail import open_tail

Floats = NDArray[np.float32]

# Whole images that a device may send: form and quality, of which PNG has only one.
IMAGE_WAYS: tuple[tuple[ImageForm, int], ...] = (
    *(("jpeg", quality) for quality in (50, 75, 90)),
    *(("webp", quality) for quality in (50, 75, 90)),
    ("png", 100),
)


@dataclass(frozen=True)
class Samples:
    """RGB photos, opened one at a time, and their classes in each task; none where the cloud model's answers count."""

    photos: Sequence[Callable[[], Image.Image]]
    labels_TN: Sequence[NDArray[np.int64]] = ()


@dataclass(frozen=True)
class MeasuredImages:
    """Probabilities of the first task and file sizes of whole photos, in the order of IMAGE_WAYS."""

    first_WNK: Floats
    bytes_WN: NDArray[np.int64]


@dataclass(frozen=True)
class MeasuredTap:
    """Probabilities of the first task and payload sizes at every width and rate; other tasks at the last of both."""

    first_WRNK: Floats
    bytes_WRN: NDArray[np.int64]
    others_TNK: Sequence[Floats]


@dataclass(frozen=True)
class Measurements:
    """Probabilities from every route: E exits, the taps, whole images, the cloud model for each task; true classes."""

    exits: Mapping[Precision, Floats]  # ENK
    taps: Sequence[MeasuredTap]
    images: MeasuredImages
    cloud_TNK: Sequence[Floats]
    labels_TN: Sequence[NDArray[np.int64]]

    @property
    def cloud_N(self) -> NDArray[np.int64]:
        """The cloud model's answers to the first task."""
        answers_N: NDArray[np.int64] = self.cloud_TNK[0].argmax(1)
        return answers_N


def measure(opened: Bundle, samples: Samples, title: str) -> Measurements:
    """Answer every sample every way: exits; taps through real bytes; whole images through files; the cloud alone."""
    measuring = Measuring(opened)
    rows = [measuring.photo(photo()) for photo in track(samples.photos, title, disable=not os.isatty(1))]
    cloud_TNK = [np.array(task) for task in zip(*(row.cloud for row in rows), strict=True)]
    return Measurements(
        exits={name: np.array([row.exits[name] for row in rows]).transpose(1, 0, 2) for name in measuring.heads},
        taps=[
            MeasuredTap(
                first_WRNK=np.array([first for first, _, _ in each]).transpose(1, 2, 0, 3),
                bytes_WRN=np.array([sizes for _, sizes, _ in each]).transpose(1, 2, 0),
                others_TNK=[np.array(task) for task in zip(*(others for _, _, others in each), strict=True)],
            )
            for each in zip(*(row.taps for row in rows), strict=True)
        ],
        images=MeasuredImages(
            first_WNK=np.array([row.images for row in rows]).transpose(1, 0, 2),
            bytes_WN=np.array([row.image_bytes for row in rows]).T,
        ),
        cloud_TNK=cloud_TNK,
        labels_TN=samples.labels_TN or [cloud_NK.argmax(1) for cloud_NK in cloud_TNK],
    )


@dataclass(frozen=True)
class PhotoAnswers:
    """One photo answered every way; arrays as in Measurements, without the samples' axis."""

    exits: Mapping[Precision, list[Floats]]
    taps: Sequence[tuple[list[Floats], list[list[int]], list[Floats]]]
    images: Floats
    image_bytes: list[int]
    cloud: list[Floats]


class Measuring:
    """The shipped parts of a bundle, opened to answer one photo after the other."""

    def __init__(self, opened: Bundle) -> None:
        self._manifest = opened.manifest
        self._tail = open_tail(opened)
        self.heads = {precision: Head(opened, precision=precision) for precision in opened.manifest.heads}
        self._codecs = [opened.codec(tap) for tap in range(len(opened.manifest.taps))]

    def photo(self, photo: Image.Image) -> PhotoAnswers:
        """One RGB photo, answered every way."""
        image_CHW = preprocess(photo, self._manifest.preprocessing)
        passed = {name: head.run(image_CHW) for name, head in self.heads.items()}
        spec = self._manifest.preprocessing
        files = [encode_whole(photo, spec.resize, *way, spec.fit) for way in IMAGE_WAYS]
        decoded = [preprocess(open_image(file), spec) for file in files]
        return PhotoAnswers(
            exits={name: answers for name, (_, answers) in passed.items()},
            taps=[self._tap(tap, passed["fp32"][0]) for tap in range(len(self._codecs))],
            images=self._tail.answer_images(decoded),
            image_bytes=list(map(len, files)),
            cloud=[
                probabilities(rows)[0]
                for rows in self._tail.images_to_tasks([image_CHW], range(len(self._manifest.tasks)))
            ],
        )

    def _tap(self, tap: int, features: Sequence[Floats]) -> tuple[list[Floats], list[list[int]], list[Floats]]:
        """First task's probabilities and sizes at every width and rate, other tasks' at the last of both."""
        architecture, codec = self._manifest.architecture.taps[tap], self._codecs[tap]
        first, sizes, sent, latents = [], [], [], []
        for width in range(len(architecture.widths)):
            latent_CHW = self.heads["fp32"].encode(tap, features[architecture.after], width)
            sent = [codec.compress(latent_CHW, rate) for rate in range(architecture.rates)]
            latents = [codec.dequantise(codec.decode(data, rate), rate) for rate, data in sent]
            first.append(self._tail.answer_latents(tap, latents, [rate for rate, _ in sent]))
            sizes.append([len(data) for _, data in sent])
        others = self._tail.latents_to_tasks(tap, latents[-1:], [sent[-1][0]], range(1, len(self._manifest.tasks)))
        return first, sizes, [probabilities(rows)[0] for rows in others]


def calibrated(measured: Measurements, design: Measurements | None) -> dict[str, Any]:
    """Figures of the first task on the calibration part: exits and certificates of each head, taps, whole images.

    design: other samples, by which `calibrate` chooses.
    """
    labels_N, cloud_N = measured.labels_TN[0], measured.cloud_N
    heads: dict[Precision, dict[str, Any]] = {}
    for precision, exits_ENK in measured.exits.items():
        found = calibrate(answers_of(measured, precision), answers_of(design, precision) if design else None)
        exits = [
            Exit.model_validate({"name": f"exit{index}", **figures(answer_N, labels_N, cloud_N), "score": score})
            for index, (answer_N, score) in enumerate(zip(exits_ENK.argmax(2), found.scores, strict=True))
        ]
        heads[precision] = {
            "exits": [exit_.model_dump(exclude_none=True) for exit_ in exits],
            "thresholds": [threshold.model_dump() for threshold in found.thresholds],
        }
    rates = [
        [
            [
                {
                    "mean_bytes": float(sizes_N.mean()),
                    "max_bytes": int(sizes_N.max()),
                    **figures(answer_N, labels_N, cloud_N),
                }
                for sizes_N, answer_N in zip(sizes_RN, first_RNK.argmax(2), strict=True)
            ]
            for sizes_RN, first_RNK in zip(tap.bytes_WRN, tap.first_WRNK, strict=True)
        ]
        for tap in measured.taps
    ]
    images = [
        {"form": form, "quality": quality, "mean_bytes": float(sizes_N.mean()), **figures(answer_N, labels_N, cloud_N)}
        for (form, quality), sizes_N, answer_N in zip(
            IMAGE_WAYS, measured.images.bytes_WN, measured.images.first_WNK.argmax(2), strict=True
        )
    ]
    return {"heads": heads, "rates": rates, "images": images, "calibration_samples": len(labels_N)}


def answers_of(measured: Measurements, precision: Precision) -> Answers:
    """What certificates of one head are made of."""
    return Answers(measured.exits[precision], measured.labels_TN[0], measured.cloud_N)


def figures(answer_N: NDArray[np.int64], labels_N: NDArray[np.int64], cloud_N: NDArray[np.int64]) -> dict[str, float]:
    """How many answers are right, and how many are the cloud model's."""
    return {"accuracy": float((answer_N == labels_N).mean()), "agreement": float((answer_N == cloud_N).mean())}


def final_scores(measured: Measurements, manifest: Manifest) -> dict[str, Interval]:
    """Fractions measured on the test part, with intervals."""
    labels_TN, cloud_N = measured.labels_TN, measured.cloud_N
    labels_N = labels_TN[0]
    ways: list[tuple[str, NDArray[np.int64]]] = []
    for precision, exits_ENK in measured.exits.items():
        ways += [(f"{precision} exit{index}", answer_N) for index, answer_N in enumerate(exits_ENK.argmax(2))]
    for tap, found in zip(manifest.taps, measured.taps, strict=True):
        for width, first_RNK in zip(tap.widths, found.first_WRNK, strict=True):
            ways += [(f"{tap.name} {width.width:g} rate{rate}", row) for rate, row in enumerate(first_RNK.argmax(2))]
    for (form, quality), answer_N in zip(IMAGE_WAYS, measured.images.first_WNK.argmax(2), strict=True):
        ways.append((f"{form} {quality}", answer_N))
    scores = {"test cloud accuracy": interval(cloud_N == labels_N)}
    for name, answer_N in ways:
        scores[f"test {name} accuracy"] = interval(answer_N == labels_N)
        scores[f"test {name} agreement"] = interval(answer_N == cloud_N)
    others = [(f"{tap.name}", found.others_TNK) for tap, found in zip(manifest.taps, measured.taps, strict=True)]
    for name, answers_TNK in (*others, ("cloud", measured.cloud_TNK[1:])):
        for task, answers_NK, right_N in zip(manifest.tasks[1:], answers_TNK, labels_TN[1:], strict=True):
            scores[f"test {name} {task.name} accuracy"] = interval(answers_NK.argmax(1) == right_N)
    return scores
