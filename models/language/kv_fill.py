"""Keys and values of a model's later layers straight from the row before them, for tokens that decide nothing there.

    row_H --/ its root mean square--> one matrix product --> of each layer: keys (rotated at the position), values

A closed form in place of those layers: a few per cent of their work, and an error that only later tokens' attention
sees. The first token of a text is not guessed: all others attend to it, its row is a hundred times as large as theirs,
and half of what a fill loses it would lose there. Knows nothing about where the rows come from.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024), for the first token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.language.decoder import Decoder, Linear, Span, padded_tokens, rotate
from models.language.kv_cache import KVCache
from models.language.packing import Floats
from models.language.states import SMALLEST

EXACT_ROWS = 32  # of a prompt, the last, that are left to the layers: what follows reads these most


class KVFill:
    """Fills the caches of a decoder's layers. As in its passes, a row's bits do not depend on the rows beside it."""

    def __init__(self, weight_LOH: Floats, bias_LO: Floats, behind: Decoder, skipped: int = 0) -> None:
        """The map of each layer `behind` the rows: O is all of its keys, not rotated yet, then its values.

        The first `skipped` of them are not filled: rows go through these.
        """
        self._behind, self._decoder = behind, (decoder := behind[skipped:])
        weight = torch.from_numpy(weight_LOH[skipped:]).flatten(0, 1).to(decoder.dtype)
        self._linear = Linear(weight, torch.from_numpy(bias_LO[skipped:]).flatten().to(decoder.dtype), decoder.width)

    @torch.inference_mode()
    def write(self, cache: KVCache, start: int, rows_NH: Tensor) -> None:
        """Put keys and values of rows (N, hidden), float32, behind the first `start` tokens, where `cache` then ends.

        Raises ValueError above the model's context, with the cache as long as before.
        """
        stop, width = start + len(rows_NH), self._decoder.width
        cache.reserve(padded_tokens(stop, self._decoder.config.context))
        if start == 0 and stop:
            self._behind.forward(rows_NH[:1].repeat(width, 1), [Span(cache, 0, 1)])
        for first in range(start == 0, len(rows_NH), width):
            self._write(cache, start + first, rows_NH[first : first + width])
        cache.length = stop

    def _write(self, cache: KVCache, start: int, rows_NH: Tensor) -> None:
        """At most `width` rows."""
        decoder, count = self._decoder, len(rows_NH)
        x_NH = F.pad(rows_NH, (0, 0, 0, decoder.width - count))
        x_NH = normalised(x_NH)
        shape = (decoder.width, len(decoder.layers), 2, decoder.config.kv_heads, decoder.config.head_dim)
        pairs_NL2KD = self._linear(x_NH.to(decoder.dtype)).view(shape)
        cos_N1D, sin_N1D = decoder.rotation(range(start, start + count))
        for place, layer in enumerate(decoder.layers):
            keys_NKD = rotate(pairs_NL2KD[:, place, 0].float(), cos_N1D, sin_N1D).to(decoder.dtype)
            cache.write(layer, start, keys_NKD[:count], pairs_NL2KD[:count, place, 1])


def normalised(rows: Tensor) -> Tensor:
    """Rows (.., hidden) divided by their root mean square: what a fill's map takes."""
    return rows / (rows.square().mean(-1, keepdim=True).sqrt() + SMALLEST)
