"""The cloud service with a decoder that is several times slower: a larger model, as far as time is concerned.

    python -m tests.bench.slow_cloud --listen ... --model ...        with ISTHMUS_BENCH_SLOWDOWN=4

Every forward pass sleeps until it has lasted that many times as long. Results are unchanged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from torch import Tensor

from isthmus.cloud_service.cli import main
from isthmus.models.language.torch.decoder import Decoder, Span

SLOWDOWN = float(os.environ.get("ISTHMUS_BENCH_SLOWDOWN", "1"))


class SlowDecoder(Decoder):
    """A decoder whose forward passes are delayed."""

    def forward(self, x_NH: Tensor, spans: Sequence[Span]) -> Tensor:
        started_s = time.perf_counter()
        result_NH = super().forward(x_NH, spans)
        super().logits(result_NH)  # a slow model's head is slow too
        time.sleep((SLOWDOWN - 1) * (time.perf_counter() - started_s))
        return result_NH


if __name__ == "__main__":
    import isthmus.cloud_service.language.service

    if SLOWDOWN > 1:
        isthmus.cloud_service.language.service.Decoder = SlowDecoder  # type: ignore[misc]
    main()
