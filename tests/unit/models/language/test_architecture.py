"""Rotary frequencies against transformers and against the formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from isthmus.models.language.architecture import LinearScaling, LlamaConfig, RopeScaling, rope_frequencies


def config(head_dim: int, theta: float, scaling: RopeScaling | LinearScaling | None = None) -> LlamaConfig:
    return LlamaConfig(2, 64, 4, 2, head_dim, 128, 259, 131_072, theta, 1e-5, tied=True, rope_scaling=scaling)


def theirs(transformers: Any, ours: LlamaConfig) -> Any:
    """Frequencies that transformers computes for the same numbers."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": ours.rope_theta}
    scaling = ours.rope_scaling
    if isinstance(scaling, LinearScaling):
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    elif scaling:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor}
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_context
    llama = transformers.LlamaConfig(head_dim=ours.head_dim, max_position_embeddings=ours.context, rope_parameters=rope)
    return transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(llama).inv_freq.numpy()


@pytest.mark.parametrize("head_dim", [2, 16, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_plain_frequencies(transformers: Any, head_dim: int, theta: float) -> None:
    ours = config(head_dim, theta)
    found = rope_frequencies(ours)
    assert found.shape == (head_dim // 2,) and found.dtype == np.float32
    np.testing.assert_allclose(found, theirs(transformers, ours), rtol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(8.0, 1.0, 4.0, 8192),  # Llama 3.1
        RopeScaling(32.0, 1.0, 4.0, 8192),  # Llama 3.2
        RopeScaling(2.0, 0.5, 16.0, 512),
        RopeScaling(1.0, 1.0, 4.0, 8192),
    ],
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_llama3_scaling(transformers: Any, head_dim: int, scaling: RopeScaling) -> None:
    ours = config(head_dim, 500_000.0, scaling)
    found = rope_frequencies(ours)
    assert found.shape == (head_dim // 2,) and found.dtype == np.float32
    np.testing.assert_allclose(found, theirs(transformers, ours), rtol=2e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0, 2.5])
def test_linear_scaling(transformers: Any, factor: float) -> None:
    ours = config(64, 10_000.0, LinearScaling(factor))
    found = rope_frequencies(ours)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, theirs(transformers, ours), rtol=1e-6)


def test_llama3_scaling_by_hand() -> None:
    """High frequencies stay, low ones are divided, between them the mixture is linear in turns."""
    plain = rope_frequencies(config(128, 500_000.0)).astype(np.float64)
    scaled = rope_frequencies(config(128, 500_000.0, RopeScaling(8.0, 1.0, 4.0, 8192))).astype(np.float64)
    turns = 8192 * plain / (2 * math.pi)
    ratio = scaled / plain
    np.testing.assert_allclose(ratio[turns >= 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns <= 1], 1 / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert (turns >= 4).any() and (turns <= 1).any() and between.any()
    kept = (turns[between] - 1) / 3
    np.testing.assert_allclose(ratio[between], kept + (1 - kept) / 8, rtol=1e-5)
