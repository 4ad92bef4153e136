"""A trained split classifier -> a bundle: weights, ONNX head, integer tables, and measured figures.

Everything measured here runs the shipped parts: ONNX Runtime's head, the entropy coder's real bytes, the loaded tail.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from isthmus.models.bundle.files import write_bundle
from isthmus.models.recipes.common.environment import environment
from isthmus.models.recipes.vision.measure import Samples, calibrated, final_scores, measure
from isthmus.models.recipes.vision.parts import Parts, Trained, cloud_parts, head_parts, macs
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Manifest

VERSIONS = ("torch", "compressai", "constriction", "onnxruntime", "numpy")
UNITS = {
    "accuracy, agreement, coverage, loss": "fraction",
    "macs": "multiply-accumulate operations an input",
    "mean_bytes, max_bytes": "entropy-coded bytes an input, without framing",
    "seconds": "s",
    "shapes": "channels, height, width",
}


def write(
    folder: Path, trained: Trained, about: dict[str, Any], training: dict[str, Any], calibration: Samples, test: Samples
) -> Bundle:
    """Write a bundle: first a draft with placeholder figures, then, measured with the draft, the final one.

    `about` has name and licence; `training` command, seed, seconds and data.
    """
    trained.split.eval()
    cloud, cloud_files = cloud_parts(trained)
    parts = head_parts(trained)
    files = {**parts.files, **cloud_files}
    manifest = {**about, **cloud, **entries(trained, parts, training)}
    with tempfile.TemporaryDirectory() as scratch:
        draft = {**manifest, **placeholders(trained, parts)}
        opened = Bundle.open(write_bundle(Path(scratch) / "draft", draft, files, Manifest))
        decided = calibrated(measure(opened, calibration, "calibration"), calibration.labels_TN[0])
        scores = final_scores(measure(opened, test, "test"), trained, test.labels_TN)
    final = {
        **manifest,
        "heads": {name: {"files": own, **decided["heads"][name]} for name, own in parts.heads.items()},
        "taps": with_rates(parts.taps, decided["rates"]),
        "scores": {name: score.model_dump() for name, score in scores.items()},
    }
    return Bundle.open(write_bundle(folder, final, files, Manifest))


def entries(trained: Trained, parts: Parts, training: dict[str, Any]) -> dict[str, Any]:
    """Manifest entries that are known before anything is measured."""
    return {
        "tasks": [task.model_dump(mode="json") for task in trained.tasks],
        "preprocessing": trained.preprocessing.model_dump(mode="json"),
        "architecture": trained.architecture.model_dump(mode="json", exclude_none=True),
        "segments": parts.segments,
        "tail_macs": macs(
            trained.split.backbone.section(trained.split.cuts[-1]), torch.zeros(1, *parts.segments[-1]["output"])
        ),
        "training": {
            **training,
            **environment(VERSIONS),
        },
        "units": UNITS,
    }


def placeholders(trained: Trained, parts: Parts) -> dict[str, Any]:
    """Neutral values of the entries that are measured."""
    blank = {"mean_bytes": 0.0, "max_bytes": 0, "accuracy": 0.0, "agreement": 0.0}
    no_exits = [{"name": f"exit{i}", "accuracy": 0.0, "agreement": 0.0} for i in range(len(parts.segments))]
    return {
        "heads": {name: {"files": own, "exits": no_exits, "thresholds": []} for name, own in parts.heads.items()},
        "taps": with_rates(parts.taps, [[[blank] * tap.rates] * len(tap.widths) for tap in trained.architecture.taps]),
        "scores": {},
    }


def with_rates(taps: list[dict[str, Any]], rates: list[list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Tap entries with the figures of every width and rate."""
    return [
        {**tap, "widths": [{**width, "rates": own} for width, own in zip(tap["widths"], each, strict=True)]}
        for tap, each in zip(taps, rates, strict=True)
    ]
