"""A decoder whose forward pass is one recorded graph over fixed memory: how a CUDA device computes.

    ids -> embed -> x_NH, positions_N, blocks_LNB (copied in) -> pass of 1, 2, 4 ... chunks of attention -> x_NH

A pass has no shape that depends on what it computes. Attention reads a row's keys chunk by chunk, CHUNK_TOKENS at a
time, with a running maximum; a chunk that is masked as a whole changes no bit. So a row's bits depend on the tokens of
its own session alone, as `batch_invariance` checks on the device, and a pass is recorded once for each number of chunks
and then started by one call: launching a thousand kernels one by one takes longer than computing them.

Everything but the recording runs on a CPU too, where tests compare it with `Decoder`.

Source of the running maximum: Dao et al., "FlashAttention" (NeurIPS 2022), section 3.1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.models.language.torch.decoder import Decoder, Span
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.language.torch.kv_pool import EMPTY, PADDING, KVPool, PagedKVCache
from isthmus.models.torch_device import upload

log = logging.getLogger("isthmus.models")

CHUNK_TOKENS = 1024  # read by one product of attention; short sessions pay for one whole chunk

Pass = Callable[[], Tensor]
Record = Callable[[Pass], Pass]  # the same pass, faster; it reads and writes the same memory every time


def record_nothing(run: Pass) -> Pass:
    """The pass as it is: its kernels are launched one by one."""
    return run


def graphs_on(device: torch.device) -> Record:
    """Records CUDA graphs, whose intermediate results share memory: only one pass runs at a time."""
    return partial(record_graph, device, torch.cuda.graph_pool_handle())


def record_graph(device: torch.device, memory: Any, run: Pass) -> Pass:
    """The pass as a CUDA graph; as it is, with a warning, where CUDA cannot record it.

    `memory`: the pool of its intermediate results. Raises torch.OutOfMemoryError.
    """
    try:
        with torch.cuda.device(device):
            return replaying(run, memory)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        log.warning("a forward pass cannot be recorded on %s and is launched kernel by kernel: %s", device, reason)
        return run


def replaying(run: Pass, memory: Any) -> Pass:
    """Record a pass on the current device."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()  # what libraries allocate in their first calls must not be recorded
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, memory, capture_error_mode="thread_local"):  # the photos' thread goes on meanwhile
        out_NH = run()

    def replay() -> Tensor:
        graph.replay()
        return out_NH

    return replay


class PagedDecoder(Decoder):
    """A decoder with the same weights. Its caches are blocks of `pool`; they fit no other kind of decoder."""

    def __init__(self, decoder: Decoder, pool: KVPool, record: Record) -> None:
        super().__init__(
            decoder.config,
            decoder._layers,
            decoder._embedding_VH,
            decoder._norm_H,
            decoder._head,
            decoder.dtype,
            decoder.width,
        )
        self._pool, self._record = pool, record
        context_blocks = -(-self.config.context // pool.block_tokens)
        self._chunk_blocks = min(max(CHUNK_TOKENS // pool.block_tokens, 1), context_blocks)
        self._most_chunks = -(-context_blocks // self._chunk_blocks)
        self._passes: dict[int, Pass] = {}  # by their chunks
        shape = (len(self.layers), self.width, self._most_chunks * self._chunk_blocks)
        with torch.device(self.device):
            self._x_NH = torch.zeros(self.width, self.config.hidden)
            self._positions_N = torch.zeros(self.width, dtype=torch.int64)
            self._written_LN = torch.zeros(shape[:2], dtype=torch.int64)
            self._blocks_LNB = torch.zeros(shape, dtype=torch.int64)

    def __getitem__(self, cut: slice) -> Decoder:
        return PagedDecoder(super().__getitem__(cut), self._pool, self._record)

    @property
    def far_positions(self) -> Sequence[int]:
        """Of each pass but the shortest the first position that needs it, if the pool can hold such a session."""
        chunk_tokens = self._chunk_blocks * self._pool.block_tokens
        firsts = (chunk_tokens << step for step in range((self._most_chunks - 1).bit_length()))
        return [first for first in firsts if self.new_cache().bytes_for(first + 1) <= self._pool.budget_bytes]

    def new_cache(self) -> KVCache:
        return PagedKVCache(self._pool, self.layers)

    @torch.inference_mode()
    def forward(self, x_NH: Tensor, spans: Sequence[Span]) -> Tensor:
        for span in spans:
            span.cache.reserve(span.start + span.count)
        chunks = self._place(spans)
        self._x_NH.copy_(upload(x_NH, self.device))
        if chunks not in self._passes:
            self._passes[chunks] = self._record(lambda: self._run_pass(chunks))
        x_NH = self._passes[chunks]().clone()  # the next pass writes into the same memory
        for span in spans:
            span.cache.length = span.start + span.count
        return x_NH

    def _place(self, spans: Sequence[Span]) -> int:
        """Copy to the device where each row is, writes and reads; the chunks of the pass that reaches all of it."""
        stops = [-(-(span.start + span.count) // self._pool.block_tokens) for span in spans]  # blocks, of each span
        chunks = 1 << (-(-max(stops, default=1) // self._chunk_blocks) - 1).bit_length()
        chunks = min(chunks, self._most_chunks)
        positions_N = np.zeros(self.width, np.int64)
        written_LN = np.full(self._written_LN.shape, PADDING)
        blocks_LNB = np.full((*written_LN.shape, chunks * self._chunk_blocks), EMPTY)
        row = 0
        for span, stop in zip(spans, stops, strict=True):
            assert isinstance(span.cache, PagedKVCache)
            rows, held_LB = slice(row, row + span.count), span.cache.blocks(self.layers)[:, :stop]
            positions_N[rows] = np.arange(span.start, span.start + span.count)
            written_LN[:, rows] = held_LB[:, positions_N[rows] // self._pool.block_tokens]
            blocks_LNB[:, rows, :stop] = held_LB[:, None]
            row += span.count
        for place, array in (
            (self._positions_N, positions_N),
            (self._written_LN, written_LN),
            (self._blocks_LNB[:, :, : blocks_LNB.shape[2]], blocks_LNB),
        ):
            place.copy_(upload(torch.from_numpy(array), self.device))
        return chunks

    def _run_pass(self, chunks: int) -> Tensor:
        """These layers on what `forward` copied in. Nothing depends on values, and nothing waits for the device."""
        pool, positions_N = self._pool, self._positions_N
        places_N = positions_N % pool.block_tokens
        size = (self._chunk_blocks, pool.block_tokens)
        masks = []
        for chunk in range(chunks):
            tokens_CT = torch.arange(size[0] * size[1], device=self.device).view(size) + chunk * size[0] * size[1]
            masks.append((tokens_CT > positions_N[:, None, None])[:, :, None, None])

        def attend(index: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
            layer = index - self.layers.start
            pool.keys_BKTD[self._written_LN[layer], :, places_N] = k_NKD
            pool.values_BKTD[self._written_LN[layer], :, places_N] = v_NKD
            blocks_NB = self._blocks_LNB[layer, :, : chunks * self._chunk_blocks]
            return attend_in_chunks(q_NHD, pool, blocks_NB.chunk(chunks, dim=1), masks).to(self.dtype)

        return self._run_layers(self._x_NH, self._rotation(positions_N.float()), attend)


def attend_in_chunks(q_NHD: Tensor, pool: KVPool, chunks: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Attention (N, heads * D), float32, of each row over its own blocks: `chunks` of them (N, C).

    `masks` (N, C, 1, 1, T) say what a row does not see; it sees something in the first chunk.
    """
    rows, heads, head_dim = q_NHD.shape
    kv_heads = pool.config.kv_heads
    q_N1KGD = q_NHD.float().mul(head_dim**-0.5).view(rows, 1, kv_heads, heads // kv_heads, head_dim)
    most_NKG = q_NHD.new_full((rows, kv_heads, heads // kv_heads), -torch.inf, dtype=torch.float32)
    total_NKG = torch.zeros_like(most_NKG)
    mixed_NKGD = torch.zeros_like(q_N1KGD[:, 0])
    for blocks_NC, mask_NC11T in zip(chunks, masks, strict=True):
        scores_NCKGT = q_N1KGD @ pool.keys_BKTD[blocks_NC].float().transpose(-1, -2)
        scores_NCKGT = scores_NCKGT.masked_fill(mask_NC11T, -torch.inf)
        before_NKG, most_NKG = most_NKG, torch.maximum(most_NKG, scores_NCKGT.amax((1, 4)))
        weights_NCKGT = (scores_NCKGT - most_NKG[:, None, :, :, None]).exp()
        fade_NKG = (before_NKG - most_NKG).exp()
        total_NKG = total_NKG * fade_NKG + weights_NCKGT.sum((1, 4))
        added_NKGD = (weights_NCKGT @ pool.values_BKTD[blocks_NC].float()).sum(1)
        mixed_NKGD = mixed_NKGD * fade_NKG[..., None] + added_NKGD
    return (mixed_NKGD / total_NKG[..., None]).reshape(rows, -1)
