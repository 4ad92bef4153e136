"""Floating-point operations of a decoder, counted from its sizes: the same at both ends, whatever computes them.

Two for each weight that a token is multiplied with, four for each number of a key that its query heads attend to.
Padding rows, norms, rotations and the lookup of embeddings are not counted.
"""

from __future__ import annotations

from isthmus.models.language.architecture import LlamaConfig


def decoder_flops(
    config: LlamaConfig, start: int, tokens: int, *, layers: int, decided: int = 0, filled: int = 0
) -> int:
    """Of `tokens` from position `start` on through `layers` layers, each attending to all before it and itself.

    decided: rows that the output head turns into logits. filled: layers whose keys and values come from the tokens'
    hidden states by one matrix each.
    """
    attended = tokens * start + tokens * (tokens + 1) // 2
    attention = 4 * config.heads * config.head_dim * attended * layers
    maps = 2 * config.hidden * 2 * config.kv_heads * config.head_dim * filled * tokens
    return 2 * layer_weights(config) * layers * tokens + attention + maps + 2 * config.hidden * config.vocab * decided


def layer_weights(config: LlamaConfig) -> int:
    """Weights of one layer that a token is multiplied with."""
    attention = config.hidden * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    return attention + 3 * config.hidden * config.ffn
