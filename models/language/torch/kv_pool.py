"""KV caches in a pool of fixed addresses, as a recorded forward pass needs them.

    pool   blocks of GROWTH_TOKENS tokens of one layer, all allocated at the start
    cache  for each of its layers the numbers of its blocks; they return to the pool with the cache's last reference

Source of the layout: Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention" (SOSP 2023).
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.models.errors import Overloaded
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.torch import kv_cache
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.torch_device import upload

PADDING, EMPTY = 0, 1  # blocks that no cache has: where padding rows write, and what stands for no block; always zeros
SPARE_CACHES = 4  # of one block a layer, beyond the budget: for checks, and for first tokens of KV fills


class KVPool:
    """Keys and values (blocks, kv_heads, block_tokens, head_dim) on a device, for caches of `budget_bytes` in all."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device, budget_bytes: int) -> None:
        """Raises torch.OutOfMemoryError when the device has no room for it."""
        self.config, self.dtype = config, dtype
        self.block_tokens, self.budget_bytes = kv_cache.GROWTH_TOKENS, budget_bytes
        shape = (config.kv_heads, self.block_tokens, config.head_dim)
        self.block_bytes = 2 * torch.zeros((), dtype=dtype).nbytes * torch.Size(shape).numel()
        blocks = 2 + budget_bytes // self.block_bytes + SPARE_CACHES * config.layers
        self.keys_BKTD = torch.zeros(blocks, *shape, dtype=dtype, device=device)
        self.values_BKTD = torch.zeros(blocks, *shape, dtype=dtype, device=device)
        self._free = list(range(EMPTY + 1, blocks))

    @property
    def free(self) -> int:
        """Blocks that no cache has."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Blocks of zeros: what is masked is multiplied with zero, and must be finite. Raises Overloaded."""
        if count > len(self._free):
            raise Overloaded(f"{count} blocks of KV cache are needed, the device's memory has {len(self._free)} left")
        taken = [self._free.pop() for _ in range(count)]
        places = upload(torch.tensor(taken), self.keys_BKTD.device)
        for blocks_BKTD in (self.keys_BKTD, self.values_BKTD):
            blocks_BKTD.index_fill_(0, places, 0)
        return taken

    def give(self, blocks: list[int]) -> None:
        """Return blocks. Any thread may do so: a cache ends where its last reference does."""
        self._free.extend(blocks)


class PagedKVCache(KVCache):
    """A cache of one session whose blocks are a pool's."""

    def __init__(self, pool: KVPool, layers: range) -> None:
        super().__init__(pool.config, layers, pool.dtype)
        self._pool, self._first = pool, layers.start
        self._owned: list[int] = []
        self._blocks_LB: NDArray[np.int64] = np.zeros((len(layers), 0), np.int64)
        weakref.finalize(self, pool.give, self._owned)

    @property
    def capacity(self) -> int:
        return self._blocks_LB.shape[1] * self._pool.block_tokens

    @property
    def bytes(self) -> int:
        return self._blocks_LB.size * self._pool.block_bytes

    def blocks(self, layers: range) -> NDArray[np.int64]:
        """Numbers of the blocks (len(layers), steps) of some of its layers, in the order of their tokens."""
        return self._blocks_LB[layers.start - self._first : layers.stop - self._first]

    def write(self, layer: int, start: int, keys_NKD: Tensor, values_NKD: Tensor) -> None:
        row = 0
        while row < len(keys_NKD):
            block, place = self._at(layer, start + row)
            stop = min(len(keys_NKD), row + self._pool.block_tokens - place)
            within = slice(place, place + stop - row)
            self._pool.keys_BKTD[block, :, within] = keys_NKD[row:stop].transpose(0, 1)
            self._pool.values_BKTD[block, :, within] = values_NKD[row:stop].transpose(0, 1)
            row = stop

    def read(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        blocks = self._blocks_LB[layer - self._first].tolist()
        keys_KTD = torch.cat([self._pool.keys_BKTD[block] for block in blocks], dim=1)
        values_KTD = torch.cat([self._pool.values_BKTD[block] for block in blocks], dim=1)
        return keys_KTD[:, :tokens], values_KTD[:, :tokens]

    def _grow(self) -> None:
        taken = self._pool.take(len(self._blocks_LB))
        self._owned += taken
        self._blocks_LB = np.concatenate([self._blocks_LB, np.array(taken, np.int64)[:, None]], axis=1)

    def _at(self, layer: int, position: int) -> tuple[int, int]:
        """Block of a position, and its place there."""
        index, place = divmod(position, self._pool.block_tokens)
        return int(self._blocks_LB[layer - self._first, index]), place
