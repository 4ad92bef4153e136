"""Check that a decoder is batch-invariant: a token's bits do not depend on the other rows of a forward pass.

logits of tokens alone == logits in blocks == logits in a mixed batch, whatever the position of the others
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.models.errors import ServiceError
from isthmus.models.language.torch.decoder import PAGE_TOKENS, Decoder, Span


def check_batch_invariance(decoder: Decoder, tokens: int = PAGE_TOKENS + 12) -> None:
    """Verify on this machine that a row's bits do not depend on the other rows of a forward pass.

    Raises ServiceError when a token's logits differ between a forward pass of its own, a block, and a mixed batch.
    """
    generator, tokens = torch.Generator().manual_seed(0), min(tokens, decoder.config.context)
    ids = torch.randint(decoder.config.vocab, (tokens,), generator=generator).tolist()
    alone = run_tokens(decoder, ids, [1] * tokens)
    blocks = run_tokens(decoder, ids, chunks(tokens, decoder.width))
    counts = chunks(tokens, max(decoder.width // 2 - 1, 1))
    beside = [run_tokens(decoder, ids, counts, ids[::-1], start) for start in (0, *decoder.far_positions)]
    if not all(torch.equal(alone, other) for other in (blocks, *beside)):
        raise ServiceError("results on this machine depend on the batch; lossless verification needs --width 1")


def chunks(total: int, size: int) -> list[int]:
    """`total` as counts of at most `size`."""
    return [min(size, total - start) for start in range(0, total, size)]


def run_tokens(
    decoder: Decoder, ids: Sequence[int], counts: Sequence[int], other_ids: Sequence[int] = (), other_start: int = 0
) -> Tensor:
    """Logits (len(ids), vocab) with `counts` tokens a forward pass, next to one token each of `other_ids`.

    The others are at positions from `other_start` on, as far as the context goes.
    """
    cache, other_cache, logits, start = decoder.new_cache(), decoder.new_cache(), [], 0
    for step, count in enumerate(counts):
        other = list(other_ids[step : step + 1]) if count < decoder.width else []
        spans = [Span(other_cache, min(other_start + step, decoder.config.context - 1), 1)] if other else []
        x_NH = decoder.embed([*other, *ids[start : start + count]])
        x_NH = decoder.forward(x_NH, [*spans, Span(cache, start, count)])
        logits.append(decoder.logits(x_NH)[len(other) : len(other) + count])
        start += count
    return torch.cat(logits)
