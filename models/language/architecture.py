"""Configuration of a Llama-type decoder, which covers SmolLM, Llama 2 and 3, Mistral, Qwen 2 and Qwen 3."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's scaling of rotary frequencies (Llama 3 report, section 3.2; `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, Chen et al., 2023; `rope_type: linear`)."""

    factor: float


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes in elements, `context` in tokens."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    rope_theta: float
    norm_eps: float
    tied: bool  # the output head shares the embedding's weights
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # Qwen 3: RMSNorm of each query and key head
    rope_scaling: RopeScaling | LinearScaling | None = None


def rope_frequencies(config: LlamaConfig) -> NDArray[np.float32]:
    """Rotary frequencies (head_dim / 2,) in radians a token (Su et al., 2021)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if isinstance(scaling, LinearScaling):
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    turns = scaling.original_context * frequencies / (2 * math.pi)  # within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = np.clip(smooth, 0, 1)  # of the unscaled frequency
    scaled: NDArray[np.float32] = ((1 - share) * frequencies / scaling.factor + share * frequencies).astype(np.float32)
    return scaled
