"""Operations counted from sizes, against a count by hand and against each other."""

from __future__ import annotations

from dataclasses import replace

from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.flops import decoder_flops, layer_weights

TINY = LlamaConfig(
    layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=16, vocab=10, context=64, rope_theta=1e4, norm_eps=1e-5,
    tied=True,
)  # fmt: skip
SMOLLM2 = replace(TINY, layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, context=8192)


def test_a_layer_by_hand() -> None:
    """Queries and output 8x8, keys and values 8x4, gate, up and down 8x16; a token at position 3 attends to four."""
    assert layer_weights(TINY) == 2 * 64 + 2 * 32 + 3 * 128
    weights, attention, head = 2 * layer_weights(TINY), 2 * (2 * 4 * 8), 2 * 8 * 10
    assert decoder_flops(TINY, 3, 1, layers=2, decided=1) == 2 * (weights + attention) + head


def test_maps_of_a_fill_are_counted_without_attention() -> None:
    assert decoder_flops(TINY, 5, 3, layers=0, filled=2) == 2 * 8 * 2 * 4 * 2 * 3


def test_a_text_costs_the_same_in_any_parts() -> None:
    whole = decoder_flops(SMOLLM2, 0, 100, layers=30, decided=1)
    parts = [decoder_flops(SMOLLM2, start, 10, layers=30, decided=start == 90) for start in range(0, 100, 10)]
    assert whole == sum(parts)
    assert whole == sum(decoder_flops(SMOLLM2, 0, 100, layers=part) for part in (25, 5)) + 2 * 576 * 49152


def test_nearly_all_weights_count_twice_for_a_token() -> None:
    """SmolLM2 has 134.5 million parameters, its head tied to the embedding."""
    assert 0.999 < decoder_flops(SMOLLM2, 0, 1, layers=30, decided=1) / (2 * 134_515_008) < 1.002
