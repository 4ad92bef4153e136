"""What `python -m isthmus.models.bundle` verifies and prints of a vision bundle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Head, ImageWay, Manifest, Precision, Segment, Tap, Threshold, wilson

SHOWN_LABELS = 10  # of a task


def verify(folder: Path) -> Manifest:
    """The manifest of a bundle whose files, tables and weights are all readable. Raises BundleError."""
    bundle = Bundle.open(folder)
    for tap in range(len(bundle.manifest.taps)):
        bundle.codec(tap)
    if bundle.manifest.weights:
        bundle.tensors(bundle.manifest.weights)
    return bundle.manifest


def summary(manifest: Manifest) -> list[str]:
    """The lines that `inspect` prints."""
    lines = [
        f"{manifest.name}: {', '.join(task.name for task in manifest.tasks)}; {manifest.licence}",
        f"fingerprint  {manifest.fingerprint}",
        f"made by      {manifest.training.command} (seed {manifest.training.seed}, {manifest.training.seconds:.0f} s)",
        f"input        {manifest.preprocessing.crop[0]}x{manifest.preprocessing.crop[1]} RGB",
    ]
    for task in manifest.tasks:
        more = f" and {len(task.labels) - SHOWN_LABELS} more" if len(task.labels) > SHOWN_LABELS else ""
        kind = "" if task.kind == "classify" else f" ({task.kind})"
        what = ", ".join(task.labels[:SHOWN_LABELS]) or f"{task.channels} numbers"
        lines.append(f"task {task.name}{kind}: {what}{more}")
    for precision, head in manifest.heads.items():
        lines += head_table(precision, head, manifest.segments)
    for tap, built in zip(manifest.taps, manifest.architecture.taps, strict=True):
        lines += tap_table(tap, built.after)
    lines += image_table(manifest.images, manifest.calibration_samples)
    lines.append(f"figures of ways are of {manifest.calibration_samples} calibration images")
    for name, score in manifest.scores.items():
        lines.append(f"{name:<24} {score.value:.4f} [{score.low:.4f}, {score.high:.4f}] n={score.samples}")
    return lines


def head_table(precision: Precision, head: Head, segments: Sequence[Segment]) -> list[str]:
    """A line about a head, one for each of its exits, what its certificates depend on, and a line for each of them."""
    lines = [f"head {precision}:"]
    for segment, exit_ in zip(segments, head.exits, strict=True):
        judged = "correctness head" if exit_.score else "highest probability"
        lines.append(
            f"    {exit_.name:<10} after {segment.output}, {segment.macs / 1e6:.0f} MMAC:"
            f" accuracy {exit_.accuracy:.3f}, agreement {exit_.agreement:.3f}, judged by its {judged}"
        )
    on = head.depends_on
    lines.append(
        f"    certificates hold for graphs {on.graphs[:12]}, cloud {on.cloud[:12]}, preprocessing"
        f" {on.preprocessing[:12]}, {on.precision}, {on.runtime}"
    )
    return lines + [certificate_line(threshold) for threshold in head.thresholds]


def certificate_line(threshold: Threshold) -> str:
    """What a certificate promises, from how many samples, with what was observed."""
    lost = "loss of accuracy" if threshold.promise == "accuracy" else "other answers than the cloud's"
    among = " of what exits answer" if threshold.among == "exited" else ""
    promise = f"{lost} <= {threshold.epsilon:.1%}{among} with confidence {1 - threshold.delta:.0%}"
    if not threshold.answers:
        return f"    exit never:      {promise} {why_never(threshold)}"
    scores = ", ".join("never" if each > 1 else f"{each:.3f}" for each in threshold.confidences)
    return (
        f"    exit from  {scores}: {promise} (n={threshold.samples}, observed {threshold.loss:.2%},"
        f" coverage {threshold.coverage:.1%})"
    )


def why_never(threshold: Threshold) -> str:
    """What the calibration part lacks for this certificate."""
    needed = math.ceil(math.log(threshold.delta) / math.log1p(-threshold.epsilon)) if threshold.epsilon else math.inf
    if threshold.samples < needed:
        return f"takes {needed} calibration images without a loss, there are {threshold.samples}"
    return f"takes fewer losses than the most confident of {threshold.samples} calibration images have"


def exits_note(head: Head, epsilon: float) -> str:
    """From which epsilon on exits answer, where they do not at `epsilon`; empty where they do."""
    default = [each for each in head.thresholds if (each.promise, each.among) == ("accuracy", "all")]
    answering = [threshold.epsilon for threshold in default if threshold.answers]
    if any(each <= epsilon for each in answering):
        return ""
    never = next((why_never(each) for each in default if each.epsilon == epsilon and not each.answers), "")
    reason = f"exits never answer at the default --epsilon {epsilon:g}" + (f": it {never}" if never else "")
    return f"{reason}; " + (f"they do from --epsilon {min(answering):g} on" if answering else "nor at any other")


def image_table(images: Sequence[ImageWay], samples: int) -> list[str]:
    """A line about whole images, then one for each form and quality."""
    lines = ["whole images:", "    form  quality  mean B  accuracy            agreement"]
    for image in images:
        quality = "" if image.form == "png" else image.quality
        shown = [
            f"{value:.3f} [{low:.3f}, {high:.3f}]"
            for value in (image.accuracy, image.agreement)
            for low, high in [wilson(value, samples)]
        ]
        lines.append(f"    {image.form:<4}  {quality:>7}  {image.mean_bytes:6.0f}  {'  '.join(shown)}")
    return lines


def tap_table(tap: Tap, after: int) -> list[str]:
    """A line about a tap, then one for each of its widths and rates."""
    where = f"after segment {after - 1}" if after else "of the image"
    latent = "x".join(map(str, tap.latent))
    lines = [
        f"tap {tap.name}: {where}, latent {latent}, at most {tap.max_payload_bytes} B,"
        f" decoder and tail {tap.tail_macs / 1e6:.0f} MMAC",
        "    width  encoder MMAC  rate  mean B  max B  accuracy  agreement",
    ]
    for width in tap.widths:
        for index, rate in enumerate(width.rates):
            lines.append(
                f"    {width.width:5g}  {width.encoder_macs / 1e6:12.1f}  {index:4}  {rate.mean_bytes:6.0f}"
                f"  {rate.max_bytes:5}  {rate.accuracy:8.3f}  {rate.agreement:9.3f}"
            )
    return lines
