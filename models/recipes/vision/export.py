"""A trained split classifier -> a bundle: weights, ONNX head, integer tables, and measured figures.

Everything measured here runs the shipped parts: ONNX Runtime's head, the entropy coder's real bytes, the loaded tail.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.models.bundle.files import write_bundle
from isthmus.models.recipes.common.environment import environment
from isthmus.models.recipes.vision.measure import Samples, calibrated, final_scores, measure
from isthmus.models.recipes.vision.parts import Parts, Trained, cloud_parts, head_parts, macs
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.certificates import dependencies, runtime
from isthmus.models.vision.manifest import Manifest

VERSIONS = ("torch", "compressai", "constriction", "onnxruntime", "numpy")
UNITS = {
    "accuracy, agreement, shares, loss": "fraction",
    "macs": "multiply-accumulate operations an input",
    "mean_bytes, max_bytes": "bytes an input, entropy-coded or of the image's file, without framing",
    "seconds": "s",
    "shapes": "channels, height, width",
}


@dataclass(frozen=True)
class Data:
    """Samples to measure a bundle with, of which none trained it. `design`: samples that choose, as for `calibrate`."""

    calibration: Samples
    test: Samples
    design: Samples | None = None


def write(folder: Path, trained: Trained, about: dict[str, Any], training: dict[str, Any], data: Data) -> Bundle:
    """Write a bundle. `about` has name and licence; `training` command, seed, seconds and data."""
    trained.split.eval()
    cloud, cloud_files = cloud_parts(trained)
    parts = head_parts(trained)
    manifest = {**about, **cloud, **entries(trained, parts, training)}
    manifest |= {"taps": parts.taps, "heads": {name: {"files": own} for name, own in parts.heads.items()}}
    return write_measured(folder, manifest, {**parts.files, **cloud_files}, data)


def write_measured(folder: Path, manifest: dict[str, Any], files: Mapping[str, bytes], data: Data) -> Bundle:
    """First a draft with placeholder figures, then, measured with the draft, the final bundle.

    `manifest` lacks every measured figure: exits and certificates of heads, rates of taps, whole images, scores.
    """
    with tempfile.TemporaryDirectory() as scratch:
        draft = with_figures(manifest, placeholders(manifest))
        opened = Bundle.open(write_bundle(Path(scratch) / "draft", draft, files, Manifest))
        design = measure(opened, data.design, "design") if data.design else None
        found = calibrated(measure(opened, data.calibration, "calibration"), design)
        scores = final_scores(measure(opened, data.test, "test"), opened.manifest)
    for precision, head in found["heads"].items():
        head["depends_on"] = dependencies(opened.manifest, precision).model_dump()
    found["scores"] = {name: score.model_dump() for name, score in scores.items()}
    return Bundle.open(write_bundle(folder, with_figures(manifest, found), files, Manifest))


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


def placeholders(manifest: dict[str, Any]) -> dict[str, Any]:
    """Neutral values of the entries that are measured."""
    none = {"accuracy": 0.0, "agreement": 0.0}
    rate = {"mean_bytes": 0.0, "max_bytes": 0, **none}
    unknown = dict.fromkeys(("graphs", "cloud", "preprocessing"), "0" * 64)
    return {
        "heads": {
            name: {
                "exits": [{"name": f"exit{i}", **none} for i in range(len(head["files"]))],
                "thresholds": [],
                "depends_on": {**unknown, "precision": name, "runtime": runtime()},
            }
            for name, head in manifest["heads"].items()
        },
        "rates": [[[rate] * tap["rates"]] * len(tap["widths"]) for tap in manifest["architecture"]["taps"]],
        "images": [{"form": "png", "quality": 100, "mean_bytes": 0.0, **none}],
        "calibration_samples": 1,
        "scores": {},
    }


def with_figures(manifest: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the figures of every way."""
    taps = [
        {**tap, "widths": [{**width, "rates": own} for width, own in zip(tap["widths"], each, strict=True)]}
        for tap, each in zip(manifest["taps"], found["rates"], strict=True)
    ]
    return {
        **manifest,
        "heads": {name: {**head, **found["heads"][name]} for name, head in manifest["heads"].items()},
        "taps": taps,
        **{key: found[key] for key in ("images", "calibration_samples", "scores")},
    }
