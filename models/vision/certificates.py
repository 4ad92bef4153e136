"""What the certificates of a head depend on, and whether that is still so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import onnxruntime

from isthmus.models.vision.manifest import Dependencies, Manifest, Precision


def runtime() -> str:
    """Name and version, major and minor, of what runs the head."""
    return f"onnxruntime {'.'.join(onnxruntime.__version__.split('.')[:2])}"


def dependencies(manifest: Manifest, precision: Precision) -> Dependencies:
    """What certificates made here, now, of this head depend on."""
    cloud = (manifest.weights,) if manifest.weights else (manifest.graphs.image,) if manifest.graphs else ()
    spec = json.dumps(manifest.preprocessing.model_dump(mode="json"), sort_keys=True)
    return Dependencies(
        graphs=joined(manifest.files[name].sha256 for name in manifest.heads[precision].files),
        cloud=joined(manifest.files[name].sha256 for name in cloud),
        preprocessing=hashlib.sha256(spec.encode()).hexdigest(),
        precision=precision,
        runtime=runtime(),
    )


def joined(hashes: Iterable[str]) -> str:
    """One SHA-256 of several, in their order."""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def void_because(manifest: Manifest, precision: Precision, here: str | None = None) -> str | None:
    """Why the certificates of a head say nothing with the runtime `here`, in one line; None where they hold.

    Without one: this process's.
    """
    certified, found = manifest.heads[precision].depends_on, dependencies(manifest, precision)
    here = here or found.runtime
    if certified.runtime != here:
        return f"certified with {certified.runtime}, this is {here}"
    changed = [
        name for name in ("graphs", "cloud", "preprocessing") if getattr(certified, name) != getattr(found, name)
    ]
    return f"certified with other {', '.join(changed)}" if changed else None
