"""A language model as a bundle: 4-bit weights, the tokenizer as it is sent, and a record of how it was made.

    manifest.json         kind `language`: configuration as in config.json, fingerprint of the model it was made from
    weights.safetensors   matrices as NAME.codes (O, I / 64, 32) and NAME.scale (O, I / 64); vectors in float32
    tokenizer             see `tokenizer_format`

A weight is scale * (code - 8); of two codes in a byte, the first is in the low half. Sizes follow from the
configuration and are checked before a file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from isthmus.models.bundle.files import MANIFEST, Files, kind_of, read_manifest
from isthmus.models.bundle.manifest import BundleManifest, FileName, Sha256
from isthmus.models.errors import BundleError
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint import huggingface
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.checkpoint.weights import Blocks, Shape, tensor_shapes
from isthmus.models.language.packing import STORED_BLOCK, Floats, from_pairs, quantise_symmetric4
from isthmus.models.messages import MAX_TOKENIZER_BYTES

KIND = "language"
CODE_BYTES = STORED_BLOCK // 2  # of a block
MAX_HEADER_BYTES = 200  # of a tensor in a safetensors header
MAX_SETTINGS = 64


class LanguageManifest(BundleManifest):
    """`base`: fingerprint of the model that this one was made from. `layers`: which of its layers were kept."""

    kind: Literal["language"]
    config: Annotated[dict[str, Any], Field(max_length=MAX_SETTINGS)]
    base: Sha256
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=512)]
    weights: FileName
    tokenizer: FileName


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """`codes_OGB` are pairs of 4-bit codes."""

    codes_OGB: NDArray[np.uint8]
    scale_OG: NDArray[np.float16]

    @property
    def shape(self) -> Shape:
        return len(self.codes_OGB), self.codes_OGB.shape[1] * STORED_BLOCK


class BundleWeights:
    """The tensors of a language bundle. A `CheckpointWeights`."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Raises BundleError for a tensor of another type or with parts that do not belong together."""
        self._matrices: dict[str, StoredMatrix] = {}
        self._vectors: dict[str, NDArray[np.float32]] = {}
        for name, array in tensors.items():
            stem, _, part = name.rpartition(".")
            if part == "codes":
                self._matrices[stem] = stored_matrix(stem, array, tensors.get(f"{stem}.scale"))
            elif part != "scale" or f"{stem}.codes" not in tensors:
                if array.dtype != np.float32 or array.ndim != 1:
                    raise BundleError(f"tensor {name[:100]} is {array.dtype} with {array.ndim} axes, expected a vector")
                self._vectors[name] = array
        if twice := self._matrices.keys() & self._vectors.keys():
            raise BundleError(f"tensor {min(twice)[:100]} is there as a vector and as codes")
        self.shapes: dict[str, Shape] = {
            **{name: matrix.shape for name, matrix in self._matrices.items()},
            **{name: vector.shape for name, vector in self._vectors.items()},
        }

    def tensor(self, name: str) -> NDArray[np.float32]:
        if name in self._vectors:
            return self._vectors[name].copy()
        blocks = self._blocks(name)
        codes_NGB = blocks.codes_NK.reshape(*blocks.scale_NG.shape, -1).astype(np.float32)
        return np.asarray((codes_NGB - 8) * blocks.scale_NG[..., None], np.float32).reshape(blocks.codes_NK.shape)

    def blocks(self, name: str) -> Blocks | None:
        return self._blocks(name) if name in self._matrices else None

    def _blocks(self, name: str) -> Blocks:
        matrix = self._matrices[name]
        scale_NG = matrix.scale_OG.astype(np.float32)
        return Blocks(from_pairs(matrix.codes_OGB).reshape(matrix.shape), scale_NG, -8 * scale_NG)

    def stored(self, name: str) -> tuple[str, NDArray[np.uint8]]:
        matrix = self._matrices.get(name)
        if matrix is None:
            return "F32", self._vectors[name].view(np.uint8)
        return "symmetric4", np.concatenate([matrix.codes_OGB.ravel(), matrix.scale_OG.view(np.uint8).ravel()])


def stored_matrix(name: str, codes: NDArray[Any], scale: NDArray[Any] | None) -> StoredMatrix:
    """Raises BundleError."""
    if codes.dtype != np.uint8 or codes.ndim != 3 or codes.shape[2] != CODE_BYTES or not codes.size:
        raise BundleError(
            f"tensor {name[:100]}.codes is {codes.dtype} of shape {codes.shape}, expected blocks of bytes"
        )
    if scale is None or scale.dtype != np.float16 or scale.shape != codes.shape[:2]:
        raise BundleError(f"tensor {name[:100]}.scale is missing or not float16 of shape {codes.shape[:2]}")
    return StoredMatrix(codes, scale)


def is_bundle(path: Path) -> bool:
    """Whether a folder has a manifest, and no model in Hugging Face's format."""
    return (path / MANIFEST).is_file() and not (path / "config.json").exists()


def read(folder: Path) -> tuple[LanguageManifest, LlamaConfig, Tokenizer, BundleWeights]:
    """Raises BundleError naming what is missing, broken or inconsistent."""
    manifest = read_language_manifest(folder)
    config = huggingface.read_config(manifest.config)
    for name, limit in ((manifest.weights, weights_limit(config)), (manifest.tokenizer, MAX_TOKENIZER_BYTES)):
        if name not in manifest.files:
            raise BundleError(f"{folder}: the manifest lists no file {name}")
        if (size := manifest.files[name].size) > limit:
            raise BundleError(f"{folder}: {name} has {size} bytes, expected at most {limit} with this configuration")
    files = Files(folder, manifest.files)
    tokenizer = Tokenizer.from_bytes(files.read(manifest.tokenizer))
    return manifest, config, tokenizer, BundleWeights(files.tensors(manifest.weights))


def read_language_manifest(folder: Path) -> LanguageManifest:
    """Raises BundleError, for bundles of another kind too."""
    if (kind := kind_of(folder)) != KIND:
        raise BundleError(f"{folder}: a bundle of {(kind or 'a vision model')[:40]!a}, expected kind {KIND}")
    return read_manifest(folder, LanguageManifest)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer alone. Raises BundleError."""
    manifest = read_language_manifest(folder)
    if manifest.tokenizer not in manifest.files or manifest.files[manifest.tokenizer].size > MAX_TOKENIZER_BYTES:
        raise BundleError(f"{folder}: the manifest lists no tokenizer of at most {MAX_TOKENIZER_BYTES} bytes")
    return Tokenizer.from_bytes(Files(folder, manifest.files).read(manifest.tokenizer))


def weights_limit(config: LlamaConfig) -> int:
    """Bytes that the weights of a model of this configuration take at most."""
    total = 0
    for shape in tensor_shapes(config).values():
        if len(shape) == 1:
            total += 4 * shape[0]
        else:
            total += shape[0] * -(-shape[1] // STORED_BLOCK) * (CODE_BYTES + 2)
        total += 2 * MAX_HEADER_BYTES
    return total


def stored_tensors(tensors: Mapping[str, Floats]) -> dict[str, NDArray[Any]]:
    """Tensors of a model as a bundle stores them. Raises BundleError unless 64 divides every matrix's columns."""
    found: dict[str, NDArray[Any]] = {}
    for name, values in tensors.items():
        if values.ndim == 2:
            found[f"{name}.codes"], found[f"{name}.scale"] = quantise_symmetric4(values)
        else:
            found[name] = values.astype(np.float32)
    return found
