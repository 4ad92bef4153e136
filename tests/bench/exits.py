"""The share of photos that the exits of a bundle answer on the device, and the loss of accuracy, on test photos.

For every certified threshold: the share of photos for which the confidence of some exit reaches it, and the accuracy
when these take their exit and all others the cloud model, with 95 % Wilson intervals.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from isthmus.models.errors import IsthmusError
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.vision.calibrate import first_exit
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.exit_score import exit_score
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import preprocess
from isthmus.models.vision.manifest import Precision
from isthmus.models.vision.tail import open_tail
from tests.bench.processes import ROOT
from tests.bench.sc2_photos import Photos, labelled_option, photos_of

Row = dict[str, Any]


def exits(bundle: Bundle, photos: Photos, count: int | None, precision: Precision) -> Row:
    """All figures, as the JSON that `--json` writes."""
    head, tail, manifest = Head(bundle, precision=precision), open_tail(bundle), bundle.manifest
    labels_N = photos.labels_N[:count]
    score_NE = np.zeros((len(labels_N), head.exits))
    answer_NE = np.zeros((len(labels_N), head.exits + 1), np.int64)  # the cloud's last
    for photo in track(range(len(labels_N)), "photos", console=Console(stderr=True), transient=True):
        x_CHW = image_CHW = preprocess(photos.image(photo), manifest.preprocessing)
        answers: list[NDArray[np.float32]] = []
        for index, exit_ in enumerate(manifest.heads[precision].exits):
            x_CHW, probabilities_K = head.segment(index, x_CHW)
            answers.append(probabilities_K)
            score_NE[photo, index] = exit_score(answers, exit_)
            answer_NE[photo, index] = probabilities_K.argmax()
        answer_NE[photo, -1] = tail.answer_images([image_CHW])[0].argmax()
    right_NE = answer_NE == labels_N[:, None]
    thresholds = []
    for threshold in manifest.heads[precision].thresholds:
        if (threshold.promise, threshold.among) != ("accuracy", "all"):
            continue
        taken_N = first_exit(score_NE.T, threshold.confidences)
        right_N = right_NE[np.arange(len(labels_N)), taken_N]
        thresholds.append(
            {
                "epsilon": threshold.epsilon,
                "confidences": threshold.confidences,
                "on_device": interval(taken_N < head.exits).model_dump(),
                "each_exit": [float((taken_N == index).mean()) for index in range(head.exits)],
                "accuracy": interval(right_N).model_dump(),
                "lost": float(right_NE[:, -1].mean() - right_N.mean()),
            }
        )
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "bundle": manifest.fingerprint,
        "name": manifest.name,
        "precision": precision,
        "n": len(labels_N),
        "cloud_accuracy": interval(right_NE[:, -1]).model_dump(),
        "exit_accuracy": [interval(right_N).model_dump() for right_N in right_NE.T[:-1]],
        "thresholds": thresholds,
    }


def table(result: Row) -> str:
    """Markdown."""
    title = "| loss certified up to | confidence from | on the device | accuracy | lost |"
    lines = [title, "|---:|---:|---:|---:|---:|"]
    for row in result["thresholds"]:
        device, accuracy = row["on_device"], row["accuracy"]
        lines.append(
            f"| {row['epsilon']:.1%} | {', '.join('never' if x > 1 else f'{x:.3f}' for x in row['confidences'])}"
            f" | {device['value']:.1%} [{device['low']:.1%}, {device['high']:.1%}]"
            f" | {accuracy['value']:.2%} [{accuracy['low']:.2%}, {accuracy['high']:.2%}] | {100 * row['lost']:+.2f} |"
        )
    cloud, only = result["cloud_accuracy"], ", ".join(f"{row['value']:.1%}" for row in result["exit_accuracy"])
    return "\n".join(
        [
            *lines,
            "",
            f"{result['n']} photos, {result['precision']}; cloud model {cloud['value']:.2%}; exits only {only}.",
        ]
    )


@click.command(epilog="Example: python -m tests.bench.exits --bundle models/zoo/fashion --json runs/exits.json")
@click.option("--bundle", default=ROOT / "models" / "zoo" / "fashion", type=click.Path(path_type=Path))
@labelled_option
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "int8"]))
@click.option("--photos", type=click.IntRange(2), help="Number of test photos.  [default: all]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
def main(bundle: Path, labelled: Path | None, precision: Precision, photos: int | None, json_path: Path | None) -> None:
    """Measure what share a bundle's exits answer, and the accuracy; print a Markdown table."""
    try:
        opened = Bundle.open(bundle)
        result = exits(opened, photos_of(opened.manifest.tasks[0].name, labelled), photos, precision)
    except (IsthmusError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    click.echo(table(result))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"\nfigures: {json_path}")


if __name__ == "__main__":
    main()
