"""The shape of a Llama-type decoder: SmolLM, Llama 2 and 3, Mistral, Qwen 2 and 3 differ by these numbers alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's scaling of rotary frequencies (Llama 3 report, section 3.2; `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes in numbers of elements; `context` in tokens."""

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
    tied: bool  # the output head is the embedding
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # Qwen 3: RMSNorm of each query and key head
    rope_scaling: RopeScaling | None = None
