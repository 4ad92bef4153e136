"""Accuracy and bytes of a bundle as it runs: ONNX Runtime's head, the entropy coder's real bytes, the loaded tail."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from isthmus.models.bundle.manifest import Interval
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.vision.calibrate import certify
from isthmus.models.recipes.vision.parts import Trained
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.manifest import Precision
from isthmus.models.vision.tail import open_tail

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Samples:
    """Preprocessed images (3, H, W) and their classes in each task."""

    images: Sequence[Floats]
    labels_TN: Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class MeasuredTap:
    """Probabilities of the first task and payload sizes at every width and rate; other tasks at the last of both."""

    first_WRNK: Floats
    bytes_WRN: NDArray[np.int64]
    others_TNK: Sequence[Floats]


@dataclass(frozen=True)
class Measurements:
    """Probabilities from every route: E exits, the taps, the unsplit cloud model for each task."""

    exits: Mapping[Precision, Floats]  # ENK
    taps: Sequence[MeasuredTap]
    cloud_TNK: Sequence[Floats]


def measure(opened: Bundle, samples: Samples, title: str) -> Measurements:
    """Answer every sample every way: exits; taps, widths and rates through real bytes; the unsplit cloud model."""
    tail, manifest = open_tail(opened), opened.manifest
    heads = {precision: Head(opened, precision=precision) for precision in manifest.heads}
    tasks = range(len(manifest.tasks))
    codecs = [opened.codec(tap) for tap in range(len(manifest.taps))]
    exits: dict[Precision, list[list[Floats]]] = {precision: [] for precision in heads}
    cloud = []
    taps: list[list[tuple[Any, Any, Any]]] = [[] for _ in codecs]
    for image_CHW in track(samples.images, title, disable=not os.isatty(1)):
        features: list[Floats] = []
        for precision, head in heads.items():
            inputs, answers = [image_CHW], []
            for index in range(head.exits):
                features_CHW, probabilities_K = head.segment(index, inputs[-1])
                inputs.append(features_CHW)
                answers.append(probabilities_K)
            exits[precision].append(answers)
            if precision == "fp32":
                features = inputs
        cloud.append([rows[0] for rows in tail.images_to_tasks([image_CHW], tasks)])
        for tap, codec in enumerate(codecs):
            architecture = manifest.architecture.taps[tap]
            first, sizes, latents = [], [], []
            for width in range(len(architecture.widths)):
                latent_CHW = heads["fp32"].encode(tap, features[architecture.after], width)
                sent = [codec.compress(latent_CHW, rate) for rate in range(architecture.rates)]
                latents = [codec.dequantise(codec.decode(data, rate), rate) for rate, data in sent]
                first.append(tail.answer_latents(tap, latents, [rate for rate, _ in sent]))
                sizes.append([len(data) for _, data in sent])
            others = tail.latents_to_tasks(tap, latents[-1:], [sent[-1][0]], tasks[1:])
            taps[tap].append((first, sizes, [rows[0] for rows in others]))
    return Measurements(
        exits={precision: np.array(rows).transpose(1, 0, 2) for precision, rows in exits.items()},
        taps=[
            MeasuredTap(
                first_WRNK=np.array([first for first, _, _ in rows]).transpose(1, 2, 0, 3),
                bytes_WRN=np.array([sizes for _, sizes, _ in rows]).transpose(1, 2, 0),
                others_TNK=[np.array(task) for task in zip(*(others for _, _, others in rows), strict=True)],
            )
            for rows in taps
        ],
        cloud_TNK=[np.array(task) for task in zip(*cloud, strict=True)],
    )


def calibrated(measured: Measurements, labels_N: NDArray[np.int64]) -> dict[str, Any]:
    """Figures of the first task on the calibration part: exits and thresholds of each head, rates of each tap."""
    cloud_N = measured.cloud_TNK[0].argmax(1)
    heads: dict[Precision, dict[str, Any]] = {}
    for precision, exits_ENK in measured.exits.items():
        answers_EN = exits_ENK.argmax(2)
        exits = [
            {"name": f"exit{index}", "accuracy": mean(answer_N == labels_N), "agreement": mean(answer_N == cloud_N)}
            for index, answer_N in enumerate(answers_EN)
        ]
        thresholds = certify(exits_ENK.max(2), answers_EN == labels_N, cloud_N == labels_N)
        heads[precision] = {"exits": exits, "thresholds": [threshold.model_dump() for threshold in thresholds]}
    rates = [
        [
            [
                {
                    "mean_bytes": float(sizes_N.mean()),
                    "max_bytes": int(sizes_N.max()),
                    "accuracy": mean(answer_N == labels_N),
                    "agreement": mean(answer_N == cloud_N),
                }
                for sizes_N, answer_N in zip(sizes_RN, first_RNK.argmax(2), strict=True)
            ]
            for sizes_RN, first_RNK in zip(tap.bytes_WRN, tap.first_WRNK, strict=True)
        ]
        for tap in measured.taps
    ]
    return {"heads": heads, "rates": rates}


def final_scores(
    measured: Measurements, trained: Trained, labels_TN: Sequence[NDArray[np.int64]]
) -> dict[str, Interval]:
    """Fractions measured on the test part, with intervals."""
    labels_N, cloud_N = labels_TN[0], measured.cloud_TNK[0].argmax(1)
    scores = {"test cloud accuracy": interval(cloud_N == labels_N)}
    for precision, exits_ENK in measured.exits.items():
        for index, answer_N in enumerate(exits_ENK.argmax(2)):
            scores[f"test {precision} exit{index} accuracy"] = interval(answer_N == labels_N)
            scores[f"test {precision} exit{index} agreement"] = interval(answer_N == cloud_N)
    for tap, described, built in zip(measured.taps, trained.taps, trained.architecture.taps, strict=True):
        for width, first_RNK in zip(built.widths, tap.first_WRNK, strict=True):
            for rate, answer_N in enumerate(first_RNK.argmax(2)):
                name = f"test {described.name} {width:g} rate{rate}"
                scores[f"{name} accuracy"] = interval(answer_N == labels_N)
                scores[f"{name} agreement"] = interval(answer_N == cloud_N)
        for task, others_NK, right_N in zip(trained.tasks[1:], tap.others_TNK, labels_TN[1:], strict=True):
            scores[f"test {described.name} {task.name} accuracy"] = interval(others_NK.argmax(1) == right_N)
    for task, cloud_NK, right_N in zip(trained.tasks[1:], measured.cloud_TNK[1:], labels_TN[1:], strict=True):
        scores[f"test cloud {task.name} accuracy"] = interval(cloud_NK.argmax(1) == right_N)
    return scores


def mean(right_N: NDArray[np.bool_]) -> float:
    return float(right_N.mean())
