"""What `python -m isthmus.models.bundle` verifies and prints of a handoff bundle."""

from __future__ import annotations

from pathlib import Path

from isthmus.models.bundle.files import Files, read_manifest
from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.handoff.manifest import HandoffManifest


def verify(folder: Path) -> HandoffManifest:
    """The manifest of a bundle whose files and tables are all readable. Raises BundleError."""
    manifest = read_manifest(folder, HandoffManifest)
    files = Files(folder, manifest.files)
    files.check()
    StateCodec(files.tensors(manifest.states), manifest.hidden, len(manifest.rates), manifest.max_state_bytes)
    return manifest


def summary(manifest: HandoffManifest) -> list[str]:
    """The lines that `inspect` prints."""
    made = manifest.training
    lines = [
        f"{manifest.name}: exits and hidden states of the model {manifest.base[:12]}…; {manifest.licence}",
        f"fingerprint  {manifest.fingerprint}",
        f"made by      {made.command} (seed {made.seed}, {made.seconds:.0f} s)",
    ]
    for exit_ in manifest.exits:
        lines.append(f"exit after {exit_.depth} layers: {exit_.agreement:.1%} agreement with the full model")
    for threshold in manifest.thresholds[::5]:
        lines.append(
            f"    from {threshold.confidence:.2f}: {threshold.coverage:.1%} of tokens decoded from exits,"
            f" {threshold.agreement:.1%} agreement"
        )
    for index, rate in enumerate(manifest.rates):
        lines.append(f"rate {index}: {rate.mean_bytes:.0f} B a token")
    for index, point in enumerate(manifest.points):
        lines.append(
            f"point {index}: offloaded tokens at rate {point.rate}, others at {point.context_rate}:"
            f" {point.mean_bytes:.0f} B a token, {point.agreement:.1%} agreement"
        )
    for name, score in manifest.scores.items():
        lines.append(f"{name:<32} {score.value:.4f} [{score.low:.4f}, {score.high:.4f}] n={score.samples}")
    return lines
