"""A router bundle: what a device needs to decide, for one pair of models, when its own choice will do.

    manifest.json         schema of `models.language.router.manifest`
    head.safetensors      the confidence head of single tokens
    answers.safetensors   the heads that score prompts and whole answers

It holds no weights of either model, both of which it names.
"""

from __future__ import annotations

import os
from pathlib import Path

from isthmus.models.bundle.files import Files, read_manifest
from isthmus.models.language.handoff.confidence_head import ConfidenceHead
from isthmus.models.language.router.answers import AnswerVerifier
from isthmus.models.language.router.manifest import OffloadLevel, RouterManifest
from isthmus.models.messages import ModelInfo


class RouterBundle:
    """An opened router bundle. `head`: None where single tokens are not routed; `verifier`: where answers are not."""

    def __init__(self, files: Files, manifest: RouterManifest) -> None:
        """Raises BundleError for a head that cannot be read."""
        self.manifest = manifest
        self.folder = files.folder
        self.head = ConfidenceHead.from_tensors(files.tensors(manifest.head)) if manifest.head else None
        name = manifest.verifier
        self.verifier = AnswerVerifier.from_tensors(files.tensors(name)) if name else None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> RouterBundle:
        """Raises BundleError for a broken bundle."""
        manifest = read_manifest(Path(folder), RouterManifest)
        files = Files(Path(folder), manifest.files)
        files.check()
        return cls(files, manifest)

    @property
    def levels(self) -> tuple[OffloadLevel, ...]:
        """Of single tokens."""
        return self.manifest.token_levels

    def fits(self, model: ModelInfo) -> bool:
        """Whether it is for the cloud's model: by its weights where they are known, else by name and tokenizer."""
        cloud = self.manifest.cloud
        if cloud.weights is not None:
            return model.fingerprint.hex() == cloud.weights
        return model.name == cloud.name and model.tokenizer.sha256.hex() == cloud.tokenizer
