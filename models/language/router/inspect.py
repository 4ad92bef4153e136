"""What `python -m isthmus.models.bundle` verifies and prints of a router bundle."""

from __future__ import annotations

from pathlib import Path

from isthmus.models.language.router.bundle import RouterBundle
from isthmus.models.language.router.manifest import OffloadLevel, RouterManifest


def verify(folder: Path) -> RouterManifest:
    """The manifest of a bundle whose files are all readable. Raises BundleError."""
    return RouterBundle.open(folder).manifest


def summary(manifest: RouterManifest) -> list[str]:
    """The lines that `inspect` prints."""
    made, device, cloud = manifest.training, manifest.device, manifest.cloud
    weights = f"weights {cloud.weights[:12]}…" if cloud.weights else f"tokenizer {cloud.tokenizer[:12]}…"
    lines = [
        f"{manifest.name}: {device.name} {device.weights[:12]}… in {device.bits} bits on the device, {cloud.name}"
        f" ({weights}) in the cloud; {manifest.licence}",
        f"fingerprint  {manifest.fingerprint}",
        f"made by      {made.command} (seed {made.seed}, {made.seconds:.0f} s)",
        f"from         {made.data}",
    ]
    for kind, levels in (
        ("tokens", manifest.token_levels),
        ("answers", manifest.answer_levels),
        ("queries", manifest.query_levels),
    ):
        lines += [f"{kind} from {level.likely:.3f}: {describe(level)}" for level in levels]
    for name, score in manifest.scores.items():
        lines.append(f"{name:<32} {score.value:.4f} [{score.low:.4f}, {score.high:.4f}] n={score.samples}")
    return lines


def describe(level: OffloadLevel) -> str:
    """A level for a person."""
    wrong, promise = level.wrong, level.certificate
    return (
        f"{level.asked:.1%} asked, {wrong.value:.2%} [{wrong.low:.2%}, {wrong.high:.2%}] wrong,"
        f" certified {promise.epsilon:.2%} with confidence {1 - promise.delta:.0%} from {promise.prompts} prompts"
    )
