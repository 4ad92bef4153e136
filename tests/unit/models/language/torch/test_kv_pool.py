"""What a cache in a pool holds, where that goes, and what a pool refuses."""

from __future__ import annotations

import gc

import pytest
import torch

from isthmus.models.errors import Overloaded
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.torch.kv_cache import GROWTH_TOKENS, KVCache
from isthmus.models.language.torch.kv_pool import EMPTY, PADDING, SPARE_CACHES, KVPool, PagedKVCache
from isthmus.models.torch_device import CPU

CONFIG = LlamaConfig(3, 24, 6, 2, 4, 32, 259, 600, 10_000.0, 1e-5, tied=True)
STEP_BYTES = 3 * 2 * 2 * GROWTH_TOKENS * 4 * 4  # three layers, keys and values, two heads of four floats


def pool(steps: int = 4) -> KVPool:
    return KVPool(CONFIG, torch.float32, CPU, steps * STEP_BYTES)


def some(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    pair = torch.randn(2, tokens, CONFIG.kv_heads, CONFIG.head_dim, generator=torch.Generator().manual_seed(seed))
    return pair[0], pair[1]


def test_it_takes_as_much_as_a_cache_of_its_own_memory() -> None:
    paged, own = PagedKVCache(pool(), range(3)), KVCache(CONFIG, range(3), torch.float32)
    for tokens in (0, 1, GROWTH_TOKENS, GROWTH_TOKENS + 1):
        assert paged.bytes_for(tokens) == own.bytes_for(tokens)
        for cache in (paged, own):
            cache.reserve(tokens)
        assert (paged.capacity, paged.bytes) == (own.capacity, own.bytes)
    with pytest.raises(ValueError, match="601 tokens, the model's context is 600"):
        paged.reserve(601)


@pytest.mark.parametrize("start", [0, GROWTH_TOKENS - 3, GROWTH_TOKENS])
def test_what_is_written_is_read_as_from_a_cache_of_its_own_memory(start: int) -> None:
    """Also across the end of a block; other layers and other caches keep theirs."""
    shared = pool()
    other, paged = PagedKVCache(shared, range(1, 3)), PagedKVCache(shared, range(1, 3))
    own = KVCache(CONFIG, range(1, 3), torch.float32)
    for cache in (other, paged, own):
        cache.reserve(GROWTH_TOKENS + 10)
    for layer in (1, 2):
        other.write(layer, 0, *some(GROWTH_TOKENS + 10, 9))
        for cache in (paged, own):
            cache.write(layer, start, *some(8, layer))
    for layer in (1, 2):
        for found_KTD, expected_KTD in zip(paged.read(layer, 264), own.read(layer, 264), strict=True):
            assert found_KTD.shape == (CONFIG.kv_heads, 264, CONFIG.head_dim)
            assert torch.equal(found_KTD, expected_KTD)
        assert torch.equal(other.read(layer, 266)[0], some(266, 9)[0].transpose(0, 1))


@pytest.mark.parametrize("tokens", [1, GROWTH_TOKENS - 3, GROWTH_TOKENS + 9])
@pytest.mark.parametrize("paged", [True, False])
def test_a_copy_of_the_first_tokens_is_equal_and_its_own(paged: bool, tokens: int) -> None:
    shared = pool()
    made = [
        PagedKVCache(shared, range(1, 3)) if paged else KVCache(CONFIG, range(1, 3), torch.float32) for _ in range(2)
    ]
    source, copy = made
    source.reserve(GROWTH_TOKENS + 10)
    for layer in (1, 2):
        source.write(layer, 0, *some(GROWTH_TOKENS + 10, layer))
    source.length = GROWTH_TOKENS + 10
    copy.copy(source, tokens)
    assert copy.length == tokens and copy.bytes == copy.bytes_for(tokens)
    source.write(2, 0, *some(1, 9))
    for layer in (1, 2):
        for index, found_KTD in enumerate(copy.read(layer, tokens)):
            assert torch.equal(found_KTD, some(GROWTH_TOKENS + 10, layer)[index].transpose(0, 1)[:, :tokens])


def test_blocks_return_with_the_last_reference_and_are_zeros_again() -> None:
    shared = pool()
    free, cache = shared.free, PagedKVCache(shared, range(3))
    cache.reserve(GROWTH_TOKENS + 1)
    cache.write(0, 0, *some(GROWTH_TOKENS + 1, 1))
    assert shared.free == free - 6
    held = cache
    del cache
    assert shared.free == free - 6
    del held
    gc.collect()
    assert shared.free == free
    again = PagedKVCache(shared, range(3))
    again.reserve(GROWTH_TOKENS + 1)
    assert not any(again.read(layer, GROWTH_TOKENS + 1)[side].any() for layer in range(3) for side in (0, 1))


def test_a_pool_that_is_full_says_so_and_a_cache_keeps_what_it_has() -> None:
    shared = pool(1)
    caches = [PagedKVCache(shared, range(3)) for _ in range(1 + SPARE_CACHES)]
    for cache in caches:
        cache.reserve(1)
    assert shared.free == 0
    with pytest.raises(Overloaded, match="3 blocks of KV cache are needed, the device's memory has 0 left"):
        caches[0].reserve(GROWTH_TOKENS + 1)
    assert caches[0].capacity == GROWTH_TOKENS
    taken = [block for cache in caches for block in cache.blocks(range(3)).flatten().tolist()]
    assert len(set(taken)) == len(taken) and not {PADDING, EMPTY} & set(taken)
