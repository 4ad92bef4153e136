"""What a device and a cloud need to share one language model by layers: exits, the codec of hidden states, the KV fill.

    manifest.json          schema of `models.language.handoff.manifest`
    exit<depth>.safetensors  a linear map, decoder layers, a norm, a judge; matrices in a few bits
    states.safetensors     transform, predictor, middle, integer tables
    fill.safetensors       keys and values of the layers behind `depth`, straight from the row before them
    copy<bits>.safetensors   a judge of what the whole model with such weights says on the device

It holds nothing of the model itself, and names that by its fingerprint.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from isthmus.models.bundle.files import Files, read_manifest
from isthmus.models.errors import BundleError
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.handoff.confidence_head import Judge
from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.handoff.manifest import HandoffManifest, OffloadLevel
from isthmus.models.language.packing import Floats, matrix, unpacked


class HandoffBundle:
    """An opened hand-off bundle, of the checkpoint at hand."""

    def __init__(self, files: Files, manifest: HandoffManifest, config: LlamaConfig) -> None:
        """Raises BundleError when states or fill do not fit the model."""
        self.manifest, self._files, self._config = manifest, files, config
        self.depth = manifest.depth
        self.depths = tuple(exit_.depth for exit_ in manifest.exits)
        self.fingerprint = bytes.fromhex(manifest.fingerprint)
        if manifest.hidden != config.hidden or not 0 < manifest.depth < config.layers:
            raise BundleError(
                f"{files.folder}: depth {manifest.depth} and {manifest.hidden} hidden values do not fit a model of"
                f" {config.layers} layers and {config.hidden}"
            )
        tensors = files.tensors(manifest.states)
        self.state_codec = StateCodec(tensors, config.hidden, len(manifest.rates), manifest.max_state_bytes)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], checkpoint: Checkpoint) -> HandoffBundle:
        """Raises BundleError for a broken bundle, or one of another model."""
        manifest = read_manifest(Path(folder), HandoffManifest)
        if bytes.fromhex(manifest.base) != checkpoint.fingerprint:
            raise BundleError(
                f"{folder}: belongs to the model {manifest.base[:12]}…, {checkpoint.name} is"
                f" {checkpoint.fingerprint.hex()[:12]}…"
            )
        files = Files(Path(folder), manifest.files)
        files.check()
        return cls(files, manifest, checkpoint.config)

    def kv_fill(self) -> tuple[Floats, Floats]:
        """Weights (layers - depth, 2 * kv_heads * head_dim, hidden) and biases (the first two of these).

        A row divided by its root mean square gives keys, not rotated yet, then values of each layer behind `depth`.
        Raises BundleError.
        """
        config, tensors = self._config, self._files.tensors(self.manifest.fill)
        bias_LO = matrix(tensors, "bias", 2)
        weight_LOH = unpacked(tensors, "weight").reshape(*bias_LO.shape, -1)
        expected = (config.layers - self.depth, 2 * config.kv_heads * config.head_dim, config.hidden)
        if weight_LOH.shape != expected or bias_LO.shape != expected[:2]:
            raise BundleError(f"{self.manifest.fill}: shape {weight_LOH.shape}, expected {expected}")
        return weight_LOH, bias_LO

    def local_model(self, bits: int) -> tuple[Judge, tuple[OffloadLevel, ...]] | None:
        """The judge of the device's copy with weights of so many bits, and what it is worth. Raises BundleError."""
        found = next((copy for copy in self.manifest.copies if copy.bits == bits), None)
        return None if found is None else (Judge.of(self._files.tensors(found.judge)), found.levels)

    def exit(self, index: int) -> dict[str, NDArray[Any]]:
        """The tensors of an exit, as stored. Raises BundleError."""
        return self._files.tensors(self.manifest.exits[index].weights)
