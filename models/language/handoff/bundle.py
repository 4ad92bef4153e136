"""A handoff bundle: what device and cloud need to split one language model by layers.

    manifest.json            schema of `models.language.handoff.manifest`
    exit<depth>.safetensors  an exit: linear map, decoder layers, norm, confidence head; matrices in a few bits
    states.safetensors       the codec of hidden states: transform, predictor, mean, integer tables
    fill.safetensors         the KV fill: linear maps from a hidden state to the upper layers' keys and values

It holds no weights of the model itself, which it names by fingerprint.
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
from isthmus.models.language.handoff.hidden_states import StateCodec
from isthmus.models.language.handoff.manifest import HandoffManifest
from isthmus.models.language.packing import Floats, matrix, unpacked


class HandoffBundle:
    """An opened handoff bundle that belongs to a given checkpoint."""

    def __init__(self, files: Files, manifest: HandoffManifest, config: LlamaConfig) -> None:
        """Raises BundleError when the manifest or the codec does not fit the model."""
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
        """The KV fill: weights (layers - depth, 2 * kv_heads * head_dim, hidden), biases (all but the last axis).

        Applied to a hidden state divided by its root mean square, each map gives one upper layer's keys, before
        rotation, then its values. Raises BundleError.
        """
        config, tensors = self._config, self._files.tensors(self.manifest.fill)
        bias_LO = matrix(tensors, "bias", 2)
        weight_LOH = unpacked(tensors, "weight").reshape(*bias_LO.shape, -1)
        expected = (config.layers - self.depth, 2 * config.kv_heads * config.head_dim, config.hidden)
        if weight_LOH.shape != expected or bias_LO.shape != expected[:2]:
            raise BundleError(f"{self.manifest.fill}: shape {weight_LOH.shape}, expected {expected}")
        return weight_LOH, bias_LO

    def exit(self, index: int) -> dict[str, NDArray[Any]]:
        """The tensors of an exit, as stored. Raises BundleError."""
        return self._files.tensors(self.manifest.exits[index].weights)
