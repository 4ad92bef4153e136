"""What a cache holds, how it grows, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.torch.kv_cache import GROWTH_TOKENS, KVCache

CONFIG = LlamaConfig(3, 24, 6, 2, 4, 32, 259, 600, 10_000.0, 1e-5, tied=True)
TOKEN_BYTES = 2 * 2 * 4 * 4  # keys and values, 2 heads of 4 elements of 4 bytes; of one layer


def cache(layers: range = range(3), dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, layers, dtype)


def some(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    pair = torch.randn(2, tokens, CONFIG.kv_heads, CONFIG.head_dim, generator=torch.Generator().manual_seed(seed))
    return pair[0], pair[1]


def test_empty() -> None:
    empty = cache()
    assert (empty.length, empty.capacity, empty.bytes, empty.bytes_for(0)) == (0, 0, 0, 0)


@given(tokens=st.integers(1, CONFIG.context), layers=st.integers(1, 3))
def test_bytes_for_is_what_it_will_hold(tokens: int, layers: int) -> None:
    for dtype, size in ((torch.float32, 1), (torch.bfloat16, 2)):
        grown = cache(range(layers), dtype)
        grown.reserve(tokens)
        assert tokens <= grown.capacity < tokens + GROWTH_TOKENS
        assert grown.bytes == grown.bytes_for(tokens) == grown.capacity * layers * TOKEN_BYTES // size


def test_what_is_written_is_read_and_survives_growth() -> None:
    full, written = cache(range(1, 3)), {}
    full.reserve(10)
    for layer in (1, 2):
        written[layer] = some(10, seed=layer)
        full.write(layer, 0, *written[layer])
    full.reserve(GROWTH_TOKENS + 1)
    assert full.capacity == 2 * GROWTH_TOKENS
    for layer, pair in written.items():
        for found, expected_NKD in zip(full.read(layer, 10), pair, strict=True):
            assert found.shape == (CONFIG.kv_heads, 10, CONFIG.head_dim)
            assert torch.equal(found, expected_NKD.transpose(0, 1))


def test_writing_in_the_middle_leaves_the_rest() -> None:
    full, first, second = cache(), some(9, seed=1), some(2, seed=2)
    full.reserve(9)
    full.write(0, 0, *first)
    full.write(0, 4, *second)
    keys_KTD, values_KTD = full.read(0, 9)
    for found_KTD, before_NKD, after_NKD in zip((keys_KTD, values_KTD), first, second, strict=True):
        expected_NKD = torch.cat([before_NKD[:4], after_NKD, before_NKD[6:]])
        assert torch.equal(found_KTD, expected_NKD.transpose(0, 1))
    assert not full.read(1, 9)[0].any()  # another layer's


def test_reading_copies_nothing() -> None:
    full = cache()
    full.reserve(4)
    keys_KTD, _ = full.read(0, 4)
    full.write(0, 2, *some(1, seed=3))
    assert keys_KTD[:, 2].all()


def test_reserve_does_not_shrink() -> None:
    full = cache()
    full.reserve(GROWTH_TOKENS)
    full.reserve(1)
    assert full.capacity == GROWTH_TOKENS


def test_above_the_context() -> None:
    full = cache()
    full.reserve(CONFIG.context)
    held = full.bytes
    with pytest.raises(ValueError, match="601 tokens, the model's context is 600"):
        full.reserve(CONFIG.context + 1)
    assert full.bytes == held


def test_truncate() -> None:
    full = cache()
    full.reserve(8)
    full.length = 8
    full.truncate(8)
    full.truncate(5)
    assert full.length == 5
    for length in (6, -1):
        with pytest.raises(ValueError, match=f"cannot roll back to {length} of 5 tokens"):
            full.truncate(length)
    assert full.length == 5
    full.truncate(0)
    assert full.length == 0
