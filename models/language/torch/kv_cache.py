"""Keys and values of one session's tokens. Knows nothing about weights or other sessions."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.models.language.architecture import LlamaConfig

GROWTH_TOKENS = 256  # capacity grows in steps of this many tokens


class KVCache:
    """Rotated keys and values of some layers, each (kv_heads, capacity, head_dim); `length` tokens are valid."""

    def __init__(self, config: LlamaConfig, layers: range, dtype: torch.dtype) -> None:
        self._shape = (2, config.kv_heads, GROWTH_TOKENS, config.head_dim)
        self._dtype = dtype
        self._layers = {layer: torch.zeros(2, config.kv_heads, 0, config.head_dim, dtype=dtype) for layer in layers}
        self._context = config.context
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return next(iter(self._layers.values())).shape[2]

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return sum(pair.nbytes for pair in self._layers.values())

    def bytes_for(self, tokens: int) -> int:
        """Memory in bytes for `tokens` tokens."""
        steps = -(-tokens // GROWTH_TOKENS)
        return steps * len(self._layers) * torch.zeros((), dtype=self._dtype).nbytes * torch.Size(self._shape).numel()

    def reserve(self, tokens: int) -> None:
        """Grow to a capacity of at least `tokens`. Raises ValueError above the model's context."""
        if tokens > self._context:
            raise ValueError(f"{tokens} tokens, the model's context is {self._context}")
        while self.capacity < tokens:
            self._grow()

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens only. Raises ValueError when there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length} of {self.length} tokens")
        self.length = length

    @torch.inference_mode()
    def copy(self, other: KVCache, tokens: int) -> None:
        """Hold the first `tokens` tokens of a cache of the same layers, and nothing else."""
        self.reserve(tokens)
        for layer in self._layers:
            keys_KTD, values_KTD = other.read(layer, tokens)
            self.write(layer, 0, keys_KTD.transpose(0, 1), values_KTD.transpose(0, 1))
        self.length = tokens

    def write(self, layer: int, start: int, keys_NKD: Tensor, values_NKD: Tensor) -> None:
        """Write keys and values of N tokens from position `start` on. The caller updates `length`."""
        pair_2KTD = self._layers[layer]
        pair_2KTD[0, :, start : start + len(keys_NKD)] = keys_NKD.transpose(0, 1)
        pair_2KTD[1, :, start : start + len(keys_NKD)] = values_NKD.transpose(0, 1)

    def read(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Views of keys and values, each (kv_heads, tokens, head_dim)."""
        pair_2KTD = self._layers[layer]
        return pair_2KTD[0, :, :tokens], pair_2KTD[1, :, :tokens]

    def _grow(self) -> None:
        """Room for GROWTH_TOKENS more."""
        room = torch.zeros(self._shape, dtype=self._dtype)
        self._layers = {layer: torch.cat([pair, room], dim=2) for layer, pair in self._layers.items()}
