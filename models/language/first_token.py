"""The state of a text's first token, which depends on no other, and which all later tokens attend to.

It is larger than all others by far, and much is lost where it is coded or guessed: on Spec-Bench answers half of what
hidden states of 300 bytes lose. So whoever holds the layers makes it from the token, exactly, once for each.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from models.language.decoder import Decoder, Span
from models.language.kv_cache import KVCache

KEPT = 64  # tokens: chats begin with the same one


class FirstToken:
    """Of a whole decoder, cut at a depth."""

    def __init__(self, decoder: Decoder, depth: int) -> None:
        self._first, self._behind = decoder[:depth], decoder[depth:]
        self._empty = decoder.new_cache
        self._made = lru_cache(KEPT)(self._make)

    def row(self, id_: int) -> Tensor:
        """What the token's row (1, hidden) is behind the depth, float32."""
        return self._made(id_)[0]

    @torch.inference_mode()
    def write(self, cache: KVCache, id_: int) -> None:
        """Put its keys and values at position 0 of the layers behind the depth; `cache` has room for them."""
        made = self._made(id_)[1]
        for layer in self._behind.layers:
            keys_K1D, values_K1D = made.read(layer, 1)
            cache.write(layer, 0, keys_K1D.transpose(0, 1), values_K1D.transpose(0, 1))

    def _make(self, id_: int) -> tuple[Tensor, KVCache]:
        cache = self._empty()
        spans = [Span(cache, 0, 1)]
        x_NH = self._first.forward(self._first.embed([id_]), spans)
        self._behind.forward(x_NH, spans)
        return x_NH[:1].clone(), cache
