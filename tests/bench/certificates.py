"""Whether certificates keep their promise: over many calibrations, how often the true loss is above epsilon.

Calibration and test photos of a shipped bundle, answered by its exits and its cloud model, are the population. Each of
many calibrations draws its samples from it at random, with replacement; the loss of the thresholds that it certifies is
then known exactly, on the whole population. The share of calibrations whose loss is above epsilon must be at most
delta, plus the sampling error of a share of so many calibrations.

Correctness heads are left out: the shipped bundles of these data have none, and what chooses voids no certificate.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track

from isthmus.models.errors import IsthmusError
from isthmus.models.recipes.common.learn_then_test import DELTA
from isthmus.models.recipes.vision import elpv, fashion
from isthmus.models.recipes.vision.calibrate import Answers, certify, common_path, divided, first_exit, own_path
from isthmus.models.recipes.vision.correctness import exit_losses
from isthmus.models.recipes.vision.measure import Samples
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.tail import open_tail
from tests.bench.processes import ROOT
from tests.bench.sc2_photos import FASHION

EPSILONS = (0.005, 0.01, 0.02)
LEAST_EXITS = 0.6  # of Fashion-MNIST at 1 %
Row = dict[str, Any]


def answered(bundle: Bundle, samples: Samples) -> Answers:
    """What the exits and the cloud model of a bundle answer."""
    head, tail, spec = Head(bundle), open_tail(bundle), bundle.manifest.preprocessing
    exits, cloud = [], []
    for photo in track(samples.photos, bundle.manifest.name, console=Console(stderr=True), transient=True):
        image_CHW = preprocess(photo(), spec)
        exits.append(head.run(image_CHW)[1])
        cloud.append(int(tail.answer_images([image_CHW])[0].argmax()))
    return Answers(np.array(exits).transpose(1, 0, 2), np.asarray(samples.labels_TN[0]), np.array(cloud))


def population(name: str, folder: Path) -> Answers:
    """Calibration and test part together; kept in `folder`, as their answers take minutes."""
    bundle, path = Bundle.open(ROOT / "models" / "zoo" / name), folder / f"{name}.npz"
    if path.exists():
        with np.load(path) as stored:
            if str(stored["fingerprint"]) == bundle.manifest.heads["fp32"].depends_on.graphs:
                return Answers(stored["exits"], stored["labels"], stored["cloud"])
    data = elpv.measuring_data() if name == "elpv" else fashion.measuring_data(FASHION)
    parts = [answered(bundle, samples) for samples in (data.calibration, data.test)]
    found = Answers(
        np.concatenate([part.exits_ENK for part in parts], axis=1),
        np.concatenate([part.labels_N for part in parts]),
        np.concatenate([part.cloud_N for part in parts]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        exits=found.exits_ENK,
        labels=found.labels_N,
        cloud=found.cloud_N,
        fingerprint=bundle.manifest.heads["fp32"].depends_on.graphs,
    )
    return found


def certificates(everybody: Answers, samples: int, calibrations: int, seed: int = 0) -> list[Row]:
    """For each promise, kind of average and epsilon: how often the loss is above it, and how many photos exit."""
    rng, exits = np.random.default_rng(seed), len(everybody.exits_ENK)
    scores_EN, answers_EN = everybody.exits_ENK.max(2).astype(np.float64), everybody.exits_ENK.argmax(2)
    lost = {
        "accuracy": exit_losses(everybody.exits_ENK, everybody.labels_N, everybody.cloud_N),
        "agreement": answers_EN != everybody.cloud_N,
    }
    found: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    for _ in track(range(calibrations), "calibrating", console=Console(stderr=True), transient=True):
        design, certifying = divided(everybody.some(rng.integers(len(everybody), size=samples)))
        path = own_path(design, (None,) * exits) if design else common_path(exits)
        for threshold in certify(certifying, (None,) * exits, path, EPSILONS):
            taken_N = first_exit(scores_EN, threshold.confidences)
            left_N = np.flatnonzero(taken_N < exits)
            losses = int(lost[threshold.promise][taken_N[left_N], left_N].sum())
            loss = losses / (len(everybody) if threshold.among == "all" else max(1, len(left_N)))
            key = (threshold.promise, threshold.among, threshold.epsilon)
            found.setdefault(key, []).append((loss, len(left_N) / len(everybody)))
    allowed = DELTA + 2 * math.sqrt(DELTA * (1 - DELTA) / calibrations)
    return [row(key, found[key], allowed) for key in itertools.product(lost, ("all", "exited"), EPSILONS)]


def row(key: tuple[str, str, float], found: list[tuple[float, float]], allowed: float) -> Row:
    """Figures of one certificate over all calibrations."""
    promise, among, epsilon = key
    loss_S, exited_S = (np.array(column) for column in zip(*found, strict=True))
    above = float((loss_S > epsilon).mean())
    return {
        "promise": promise,
        "among": among,
        "epsilon": epsilon,
        "above": above,
        "allowed": allowed,
        "kept": above <= allowed,
        "mean_loss": float(loss_S.mean()),
        "exited": float(exited_S.mean()),
        "exited_at_least": float(np.quantile(exited_S, 0.05)),
    }


def table(result: Row) -> str:
    """Markdown."""
    title = "| data | promise | among | epsilon | loss above it | allowed | mean loss | exit on the device |"
    lines = [title, "|---|---|---|---:|---:|---:|---:|---:|"]
    for name, rows in result["data"].items():
        lines += [
            f"| {name} | {each['promise']} | {each['among']} | {each['epsilon']:.1%} | {each['above']:.1%}"
            f" | {each['allowed']:.1%} | {each['mean_loss']:.2%} | {each['exited']:.1%} |"
            for each in rows
        ]
    return "\n".join([*lines, "", f"{result['calibrations']} calibrations of each; delta {DELTA:g}."])


@click.command(epilog="Example: python -m tests.bench.certificates --json runs/certificates.json")
@click.option("--calibrations", default=500, show_default=True, type=click.IntRange(10))
@click.option("--answers", default=Path("runs/certificates"), show_default=True, type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures to this file.")
def main(calibrations: int, answers: Path, json_path: Path | None) -> None:
    """Whether the exits' certificates hold, on Fashion-MNIST and ELPV."""
    result: Row = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "calibrations": calibrations, "data": {}}
    try:
        for name in ("fashion", "elpv"):
            samples = Bundle.open(ROOT / "models" / "zoo" / name).manifest.calibration_samples
            result["data"][name] = certificates(population(name, answers), samples, calibrations)
    except IsthmusError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(table(result))


if __name__ == "__main__":
    main()
