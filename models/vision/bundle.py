"""A vision model on disk: its manifest, its files, and the codecs of its taps."""

from __future__ import annotations

import os
from pathlib import Path

from isthmus.models.bundle.files import Files, read_manifest
from isthmus.models.codecs.checkerboard import ContextualCodec, from_tensors
from isthmus.models.vision.manifest import Manifest


class Bundle(Files):
    """An opened bundle: every listed file was present with the right size and hash when it was opened."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest.files)
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Bundle:
        """Read the manifest and check every file against it.

        Raises BundleError naming the file and what was wrong with it.
        """
        bundle = cls(Path(folder), read_manifest(Path(folder), Manifest))
        bundle.check()
        return bundle

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 over the whole content, 32 bytes."""
        return bytes.fromhex(self.manifest.fingerprint)

    def codec(self, tap: int) -> ContextualCodec:
        """The codec of a tap, by its index, with this bundle's tables. Raises BundleError when they are broken."""
        entry = self.manifest.taps[tap]
        tables = from_tensors(self.tensors(entry.tables), len(entry.widths[0].rates))
        return ContextualCodec(tables, entry.latent, entry.max_payload_bytes)
