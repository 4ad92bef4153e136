"""Approximate KV (KV fill): keys and values of the upper layers, computed directly from a hidden state below them.

    state_H --/ its root mean square--> one matrix product --> for each layer: keys (rotated to the position), values

Used for tokens that nothing is decoded from. It replaces the upper layers at a few per cent of their cost; its error
only reaches later tokens, through attention. The first token of a text always goes through the layers: all other tokens
attend to it, its hidden state is a hundred times as large as theirs, and approximating it would cause half of the loss.
Knows nothing about where hidden states come from.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024), for the first token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.language.handoff.hidden_states import RMS_EPSILON
from isthmus.models.language.packing import Floats
from isthmus.models.language.torch.decoder import Decoder, Span, padded_tokens, rotate
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.language.torch.layer import Linear
from isthmus.models.torch_device import download, upload

CACHED_FIRST_TOKENS = 64  # first tokens whose exact keys and values are cached
EXACT_FIRST = EXACT_LAST = 16  # tokens of a prompt that go through all layers: later tokens attend to these most
EXACT_EVERY = 256  # tokens of a prompt for each further EXACT_LAST


class KVFill:
    """Fills the KV cache of a decoder's layers. A token's bits do not depend on the tokens computed beside it."""

    def __init__(self, weight_LOH: Floats, bias_LO: Floats, upper: Decoder, skipped: int = 0) -> None:
        """Maps for each layer of `upper`; O: all keys of the layer, before rotation, then all of its values.

        The first `skipped` layers are not filled: hidden states go through them.
        """
        self._upper, self._decoder = upper, (decoder := upper[skipped:])
        self._first_tokens: dict[
            bytes, list[Tensor]
        ] = {}  # hidden state -> keys and values (2, 1, kv_heads, D) a layer
        weight = torch.from_numpy(weight_LOH[skipped:]).flatten(0, 1).to(decoder.device, decoder.dtype)
        bias = torch.from_numpy(bias_LO[skipped:]).flatten().to(decoder.device, decoder.dtype)
        self._linear = Linear(weight, bias, decoder.width)

    @torch.inference_mode()
    def write(self, cache: KVCache, start: int, states_NH: Tensor) -> None:
        """Fill the cache from position `start` with keys and values of hidden states (N, hidden), float32.

        The cache then ends after them. Raises ValueError above the model's context and leaves the length unchanged.
        """
        stop, width = start + len(states_NH), self._decoder.width
        states_NH = upload(states_NH, self._decoder.device)
        cache.reserve(padded_tokens(stop, self._decoder.config.context))
        if start == 0 and stop:
            self._write_first(cache, states_NH[:1])
        for first in range(start == 0, len(states_NH), width):
            self._write(cache, start + first, states_NH[first : first + width])
        cache.length = stop

    def _write_first(self, cache: KVCache, state_1H: Tensor) -> None:
        """Run the first token through the layers. Equal states are run once, since chats begin with the same token."""
        key = download(state_1H).tobytes()
        if key not in self._first_tokens:
            exact = self._upper.new_cache()
            self._upper.forward(state_1H.repeat(self._upper.width, 1), [Span(exact, 0, 1)])
            if len(self._first_tokens) >= CACHED_FIRST_TOKENS:
                del self._first_tokens[next(iter(self._first_tokens))]
            pairs = [torch.stack(exact.read(layer, 1)).transpose(1, 2) for layer in self._decoder.layers]
            self._first_tokens[key] = pairs
        for layer, (keys_1KD, values_1KD) in zip(self._decoder.layers, self._first_tokens[key], strict=True):
            cache.write(layer, 0, keys_1KD, values_1KD)

    def _write(self, cache: KVCache, start: int, states_NH: Tensor) -> None:
        """At most `width` hidden states."""
        decoder, count = self._decoder, len(states_NH)
        x_NH = F.pad(states_NH, (0, 0, 0, decoder.width - count))
        x_NH = normalised(x_NH)
        shape = (decoder.width, len(decoder.layers), 2, decoder.config.kv_heads, decoder.config.head_dim)
        pairs_NL2KD = self._linear(x_NH.to(decoder.dtype)).view(shape)
        cos_N1D, sin_N1D = decoder.rotation(range(start, start + count))
        keys_NLKD = rotate(pairs_NL2KD[:, :, 0].float(), cos_N1D[:, None], sin_N1D[:, None]).to(decoder.dtype)
        for place, layer in enumerate(decoder.layers):
            cache.write(layer, start, keys_NLKD[:count, place], pairs_NL2KD[:count, place, 1])


def exact_last(tokens: int) -> int:
    """How many of a prompt's last tokens go through all layers; longer prompts need more, as errors add up."""
    return max(tokens // EXACT_EVERY, 1) * EXACT_LAST


def normalised(states: Tensor) -> Tensor:
    """Hidden states (.., hidden) divided by their root mean square: the input of the maps."""
    return states / (states.square().mean(-1, keepdim=True).sqrt() + RMS_EPSILON)
