"""What `python -m isthmus.models.bundle` verifies and prints of a language bundle."""

from __future__ import annotations

from pathlib import Path

from isthmus.models.bundle.files import Files, read_manifest
from isthmus.models.language.checkpoint import huggingface
from isthmus.models.language.checkpoint.bundle import LanguageManifest
from isthmus.models.language.checkpoint.checkpoint import Checkpoint


def verify(folder: Path) -> LanguageManifest:
    """The manifest of a bundle that opens as a model. Raises BundleError."""
    manifest = read_manifest(folder, LanguageManifest)
    Files(folder, manifest.files).check()
    Checkpoint.open(folder)
    return manifest


def summary(manifest: LanguageManifest) -> list[str]:
    """The lines that `inspect` prints."""
    made, config = manifest.training, huggingface.read_config(manifest.config)
    size = sum(entry.size for entry in manifest.files.values())
    lines = [
        f"{manifest.name}: {config.layers} layers, {config.hidden} hidden values, {config.vocab} tokens, 4-bit weights,"
        f" {size / 1e6:.1f} MB; {manifest.licence}",
        f"fingerprint  {manifest.fingerprint}",
        f"made from    layers {', '.join(map(str, manifest.layers))} of the model {manifest.base[:12]}…",
        f"made by      {made.command} (seed {made.seed}, {made.seconds:.0f} s)",
        f"made of      {made.data}",
    ]
    for name, score in manifest.scores.items():
        lines.append(f"{name:<32} {score.value:.4f} [{score.low:.4f}, {score.high:.4f}] n={score.samples}")
    return lines
