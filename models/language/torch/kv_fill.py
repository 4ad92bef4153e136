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

from isthmus.models.language.handoff.hidden_states import SMALLEST
from isthmus.models.language.packing import Floats
from isthmus.models.language.torch.decoder import Decoder, Linear, Span, padded_tokens, rotate
from isthmus.models.language.torch.kv_cache import KVCache

FIRSTS = 64  # tokens that texts begin with, whose state is kept
EXACT_FIRST = EXACT_LAST = 16  # of a prompt, the first and the last, left to the layers: what follows reads these most
EXACT_EVERY = 256  # tokens of a prompt that EXACT_LAST are the last of


class KVFill:
    """Fills the caches of a decoder's layers. As in its passes, a row's bits do not depend on the rows beside it."""

    def __init__(self, weight_LOH: Floats, bias_LO: Floats, behind: Decoder, skipped: int = 0) -> None:
        """The map of each layer `behind` the rows: O is all of its keys, not rotated yet, then its values.

        The first `skipped` of them are not filled: rows go through these.
        """
        self._behind, self._decoder = behind, (decoder := behind[skipped:])
        self._firsts: dict[bytes, list[Tensor]] = {}  # by row: of each layer keys and values (2, 1, kv_heads, D)
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
            self._write_first(cache, rows_NH[:1])
        for first in range(start == 0, len(rows_NH), width):
            self._write(cache, start + first, rows_NH[first : first + width])
        cache.length = stop

    def _write_first(self, cache: KVCache, row_1H: Tensor) -> None:
        """By the layers themselves; of equal rows once, as chats begin with the same token."""
        key = row_1H.numpy().tobytes()
        if key not in self._firsts:
            made = self._behind.new_cache()
            self._behind.forward(row_1H.repeat(self._behind.width, 1), [Span(made, 0, 1)])
            if len(self._firsts) >= FIRSTS:
                del self._firsts[next(iter(self._firsts))]
            self._firsts[key] = [torch.stack(made.read(layer, 1)).transpose(1, 2) for layer in self._decoder.layers]
        for layer, (keys_1KD, values_1KD) in zip(self._decoder.layers, self._firsts[key], strict=True):
            cache.write(layer, 0, keys_1KD, values_1KD)

    def _write(self, cache: KVCache, start: int, rows_NH: Tensor) -> None:
        """At most `width` rows."""
        decoder, count = self._decoder, len(rows_NH)
        x_NH = F.pad(rows_NH, (0, 0, 0, decoder.width - count))
        x_NH = normalised(x_NH)
        shape = (decoder.width, len(decoder.layers), 2, decoder.config.kv_heads, decoder.config.head_dim)
        pairs_NL2KD = self._linear(x_NH.to(decoder.dtype)).view(shape)
        cos_N1D, sin_N1D = decoder.rotation(range(start, start + count))
        keys_NLKD = rotate(pairs_NL2KD[:, :, 0].float(), cos_N1D[:, None], sin_N1D[:, None]).to(decoder.dtype)
        for place, layer in enumerate(decoder.layers):
            cache.write(layer, start, keys_NLKD[:count, place], pairs_NL2KD[:count, place, 1])


def exact_last(tokens: int) -> int:
    """How many of a prompt's last rows are left to the layers: the more is guessed, the more counts against it."""
    return max(tokens // EXACT_EVERY, 1) * EXACT_LAST


def normalised(rows: Tensor) -> Tensor:
    """Rows (.., hidden) divided by their root mean square: what a fill's map takes."""
    return rows / (rows.square().mean(-1, keepdim=True).sqrt() + SMALLEST)
