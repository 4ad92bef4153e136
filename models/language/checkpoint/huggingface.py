"""A Llama or Qwen model in a Hugging Face folder: config.json as a configuration, *.safetensors as tensors.

Pickle files are not read. NumPy has no bfloat16, whose 16 bits are the upper half of a float32. Files may be symbolic
links, as in Hugging Face's cache; file names in an index cannot lead out of the folder. Knows nothing about tokens.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from isthmus.models.errors import BundleError
from isthmus.models.language.architecture import LinearScaling, LlamaConfig, RopeScaling
from isthmus.models.language.checkpoint import weights
from isthmus.models.language.checkpoint.gguf_file import map_file
from isthmus.models.language.checkpoint.weights import Shape, positive_integer, positive_number

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 16 << 20  # the index of Llama 3.1 405B has 0.1 MB
MAX_SHARDS = 1024
MISTRAL_WINDOW = 4096  # tokens; like the next, transformers' default for a missing key
QWEN3_HEAD_DIM = 128
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True, slots=True)
class ShardTensor:
    """A tensor in a shard: `data` are its bytes."""

    shape: Shape
    kind: str
    data: NDArray[np.uint8]


class SafetensorsWeights:
    """The tensors of every shard of a folder. A `CheckpointWeights`."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, ShardTensor] = {}
        for name in shard_names(folder):
            shard = read_shard(folder / name)
            if twice := shard.keys() & self._tensors.keys():
                raise BundleError(f"{name}: tensor {min(twice)[:100]} is in another file too")
            self._tensors.update(shard)
        used = (item for item in self._tensors.items() if not item[0].endswith("rotary_emb.inv_freq"))
        self.shapes: dict[str, Shape] = {name: stored.shape for name, stored in used}

    def tensor(self, name: str) -> NDArray[np.float32]:
        stored = self._tensors[name]
        values = stored.data.view(DTYPES[stored.kind])
        if stored.kind == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return np.array(values, np.float32).reshape(stored.shape)

    def blocks(self, name: str) -> None:
        return None

    def stored(self, name: str) -> tuple[str, NDArray[np.uint8]]:
        return self._tensors[name].kind, self._tensors[name].data


def shard_names(folder: Path) -> list[str]:
    """Names of the files that hold the weights, without folders. Raises BundleError."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        raise BundleError(f"{folder.name}: neither {WEIGHTS} nor {INDEX}; other formats of weights are not supported")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BundleError(f"{INDEX}: no weight_map, expected tensor names with file names")
    names = {str(name) for name in weight_map.values()}
    for name in names:
        if not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name, re.ASCII):
            raise BundleError(f"{INDEX}: {name[:100]!a} is not a plain name of a safetensors file")
    if len(names) > MAX_SHARDS:
        raise BundleError(f"{INDEX}: {len(names)} files, at most {MAX_SHARDS}")
    return sorted(names)


def read_shard(path: Path) -> dict[str, ShardTensor]:
    """Every tensor of one file, as views of its memory map. Raises BundleError."""
    data = map_file(path)
    try:
        with safe_open(path, "numpy"):  # validates the header: sizes, ranges, no gaps, nothing beyond the end
            length = int.from_bytes(data[:8].tobytes(), "little")
            header = json.loads(data[8 : 8 + length].tobytes())
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path.name}: not a safetensors file: {str(error)[:200]}") from error
    header.pop("__metadata__", None)
    return {name: shard_tensor(name, entry, data[8 + length :]) for name, entry in header.items()}


def shard_tensor(name: str, entry: dict[str, Any], data: NDArray[np.uint8]) -> ShardTensor:
    """One entry of a shard's header. Raises BundleError for an unsupported type."""
    kind, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if kind not in DTYPES:
        raise BundleError(f"tensor {name[:100]} is of type {kind[:20]}, this program reads {', '.join(DTYPES)}")
    if end - start != math.prod(shape) * np.dtype(DTYPES[kind]).itemsize or end > len(data):
        raise BundleError(f"tensor {name[:100]}: {end - start} bytes for shape {shape} of {kind}")
    return ShardTensor(shape, kind, data[start:end])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BundleError naming the file."""
    try:
        content = json.loads(read_bytes(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path.name}: expected a JSON object")
    return content


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file's content. Raises BundleError when it is missing, unreadable or larger than `limit` bytes."""
    try:
        if not path.is_file():
            raise BundleError(f"{path.name}: no such file in {path.parent.name}")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path.name}: cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise BundleError(f"{path.name}: larger than {limit} bytes")
    return data


def read_config(content: dict[str, Any]) -> LlamaConfig:
    """The configuration in config.json. Raises BundleError naming what is missing, unsupported or out of bounds."""
    names = content.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else str(names)
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise BundleError(f"config.json: architecture is {architecture[:60]}, this program reads {supported}")
    hidden = positive_integer(content, "hidden_size", weights.MAX_HIDDEN)
    heads = positive_integer(content, "num_attention_heads", weights.MAX_HEADS)
    rope = rope_settings(content)
    head_dim = QWEN3_HEAD_DIM if architecture == "Qwen3ForCausalLM" else hidden // heads
    given = {key: value for key, value in content.items() if value is not None}
    config = LlamaConfig(
        layers=positive_integer(content, "num_hidden_layers", weights.MAX_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=positive_integer(given, "num_key_value_heads", weights.MAX_HEADS, heads),
        head_dim=positive_integer(given, "head_dim", weights.MAX_HEAD_DIM, head_dim),
        ffn=positive_integer(content, "intermediate_size", weights.MAX_FFN),
        vocab=positive_integer(content, "vocab_size", weights.MAX_VOCAB),
        context=context_length(content, architecture),
        rope_theta=positive_number(rope, "rope_theta", 10_000.0),
        norm_eps=positive_number(content, "rms_norm_eps", 1e-6),
        tied=content.get("tie_word_embeddings") is True,
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        rope_scaling=rope_scaling(rope),
    )
    refuse_unsupported(content)
    return weights.check_config(config, "config.json")


def rope_settings(content: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or what earlier versions have in its place, merged. Raises BundleError."""
    given = [content[name] for name in ("rope_parameters", "rope_scaling") if content.get(name)]
    if any(settings != given[0] for settings in given):
        raise BundleError("config.json: rope_parameters and rope_scaling differ")
    settings = given[0] if given else {}
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        raise BundleError("config.json: rope settings are not one object of numbers")
    names = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    outside = {name: content[name] for name in names if content.get(name) is not None}
    return {"original_max_position_embeddings": content.get("max_position_embeddings"), **outside, **settings}


def rope_scaling(rope: dict[str, Any]) -> RopeScaling | LinearScaling | None:
    """The scaling of Llama 3, linear scaling, or None. Raises BundleError for any other type."""
    if (share := rope.get("partial_rotary_factor", 1)) != 1:
        raise BundleError(f"config.json: partial_rotary_factor is {str(share)[:40]}, this program supports 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(positive_number(rope, "factor"))
    if kind != "llama3":
        raise BundleError(f"config.json: rope type {str(kind)[:40]}, expected default, linear or llama3")
    return RopeScaling(
        factor=positive_number(rope, "factor"),
        low_freq_factor=positive_number(rope, "low_freq_factor"),
        high_freq_factor=positive_number(rope, "high_freq_factor"),
        original_context=positive_integer(rope, "original_max_position_embeddings", weights.MAX_CONTEXT),
    )


def refuse_unsupported(content: dict[str, Any]) -> None:
    """Raises BundleError for settings that request features the decoder lacks."""
    supported = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
    for key, value in supported.items():
        if (found := content.get(key, value)) != value:
            raise BundleError(f"config.json: {key} is {str(found)[:40]}, this program supports {value}")
    if content.get("quantization_config"):
        raise BundleError("config.json: quantised weights (quantization_config) are not supported")
    kinds = content.get("layer_types") or ["full_attention"]
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise BundleError("config.json: layer_types other than full_attention")


def context_length(content: dict[str, Any], architecture: str) -> int:
    """Tokens, no more than a sliding window of attention holds: up to there it is full attention."""
    context = positive_integer(content, "max_position_embeddings", weights.MAX_CONTEXT)
    window = content.get("sliding_window", MISTRAL_WINDOW) if architecture == "MistralForCausalLM" else None
    return (
        context
        if window is None
        else min(context, positive_integer({"sliding_window": window}, "sliding_window", 1 << 32))
    )
