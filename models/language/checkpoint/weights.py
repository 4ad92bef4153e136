"""Names and shapes of a Llama-type checkpoint's tensors, and bounds on the values of its configuration.

Shape legend: V vocabulary, D hidden, F feed-forward, N rows, K columns, G = K / 32 groups. Knows nothing about files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import BundleError
from isthmus.models.language.architecture import LlamaConfig, RopeScaling

Shape = tuple[int, ...]
MAX_LAYERS = 512  # four times Llama 3.1 405B; each takes a dozen entries before a tensor is read
MAX_HIDDEN = 1 << 16  # elements; four times Llama 3.1 405B
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024  # elements
MAX_FFN = 1 << 18  # elements
MAX_VOCAB = 1 << 20  # tokens; eight times Llama 3
MAX_CONTEXT = 1 << 24  # tokens


@dataclass(frozen=True)
class Blocks:
    """4-bit weights as stored, in groups of 32 or 64 along a row: weight = code * scale + minimum."""

    codes_NK: NDArray[np.uint8]  # 0 to 15
    scale_NG: NDArray[np.float32]
    minimum_NG: NDArray[np.float32]


class CheckpointWeights(Protocol):
    """The stored tensors of a checkpoint, by their Hugging Face names."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Every tensor's shape, from headers alone."""

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A new array of a tensor in `shapes`. Raises BundleError."""

    def blocks(self, name: str) -> Blocks | None:
        """The 4-bit groups of a tensor, or None for another storage type."""

    def stored(self, name: str) -> tuple[str, NDArray[np.uint8]]:
        """Storage type and bytes of a tensor, as in the file."""


def tensor_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Every tensor of a model with this configuration, by its Hugging Face name, in the order of the forward pass."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab, config.hidden)}
    layer = layer_shapes(config)
    for index in range(config.layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (config.hidden,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, config.hidden)
    return shapes


def layer_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """The tensors of one layer, by their names inside the layer."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (config.hidden,),
        "self_attn.q_proj.weight": (queries, config.hidden),
        "self_attn.k_proj.weight": (keys, config.hidden),
        "self_attn.v_proj.weight": (keys, config.hidden),
        "self_attn.o_proj.weight": (config.hidden, queries),
        "post_attention_layernorm.weight": (config.hidden,),
        "mlp.gate_proj.weight": (config.ffn, config.hidden),
        "mlp.up_proj.weight": (config.ffn, config.hidden),
        "mlp.down_proj.weight": (config.hidden, config.ffn),
    }
    if config.qkv_bias:
        biases = {"q": queries, "k": keys, "v": keys}
        shapes.update({f"self_attn.{part}_proj.bias": (size,) for part, size in biases.items()})
    if config.qk_norm:
        shapes.update({f"self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"})
    return shapes


def check_shapes(found: Mapping[str, Shape], config: LlamaConfig, where: str) -> None:
    """Raises BundleError for a tensor that is missing, of another shape, or not part of the model."""
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise BundleError(f"{where}: tensor {name} is missing, expected with shape {shape}")
        if found[name] != shape:
            raise BundleError(f"{where}: tensor {name} has shape {found[name]}, the configuration says {shape}")
    for name in found:
        if name not in expected and not (config.tied and name == "lm_head.weight"):
            raise BundleError(f"{where}: tensor {name[:100]} is not part of a Llama, Qwen 2 or Qwen 3 model")


def check_config(config: LlamaConfig, where: str) -> LlamaConfig:
    """Return `config`. Raises BundleError when its values are inconsistent."""
    if config.heads % config.kv_heads:
        raise BundleError(f"{where}: {config.heads} heads cannot share {config.kv_heads} key-value heads evenly")
    if config.head_dim % 2:
        raise BundleError(f"{where}: head size is {config.head_dim}, rotary embeddings need it even")
    scaling = config.rope_scaling
    if isinstance(scaling, RopeScaling) and not scaling.low_freq_factor < scaling.high_freq_factor:
        raise BundleError(f"{where}: Llama 3 rope scaling needs low_freq_factor below high_freq_factor")
    return config


def positive_integer(values: Mapping[str, Any], key: str, limit: int, default: int | None = None) -> int:
    """An integer of a configuration, 1 to `limit`. Raises BundleError, also when missing without a default."""
    value = values.get(key, default)
    if value is None:
        raise BundleError(f"configuration: {key} is missing")
    if type(value) is not int or not 1 <= value <= limit:
        raise BundleError(f"configuration: {key} is {str(value)[:40]}, expected an integer from 1 to {limit}")
    return value


def positive_number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number above zero of a configuration. Raises BundleError, also when missing without a default."""
    value = values.get(key, default)
    if value is None:
        raise BundleError(f"configuration: {key} is missing")
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise BundleError(f"configuration: {key} is {str(value)[:40]}, expected a finite number above 0")
    return float(value)
