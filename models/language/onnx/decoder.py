"""A language model on the device: ONNX Runtime, 8- or 4-bit weights, one session, a cache that can be rolled back.

    ids -> embed -> layers[0:a] -> rows -> layers[a:b] -> rows -> layers[b:] -> rows -> head -> logits

Cut at depths a, b, ..., later layers may stay behind: rows wait before them, and go through together when asked for.
Knows nothing about sampling, drafts, exits or the cloud.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from onnx import ModelProto

from isthmus.models.errors import InvalidInput
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.onnx.graph import head_graph, layers_graph
from isthmus.models.language.packing import Floats, quantise8
from isthmus.models.onnx_session import open_session, zeros

PREFILL_ROWS = 64  # tokens a run: more would only hold a larger intermediate


class OnnxLayers:
    """Consecutive layers over one sequence of at most `context` tokens, with their caches."""

    def __init__(self, graph: ModelProto, config: LlamaConfig, layers: range, context: int, threads: int) -> None:
        self._session = open_session(graph.SerializeToString(), "decoder layers", threads, spinning=True)
        self._shape = (1, config.kv_heads, context, config.head_dim)
        self._names = [f"{index}.{part}" for index in layers for part in ("key", "value")]
        self._allocate()

    def fork(self) -> OnnxLayers:
        """The same layers over another sequence: weights are shared, the KV cache is new and empty."""
        fork = copy.copy(self)
        fork._allocate()
        return fork

    def _allocate(self) -> None:
        self._binding = self._session.io_binding()
        self._caches = [zeros(self._shape) for _ in self._names]
        for name, cache in zip(self._names, self._caches, strict=True):
            self._binding.bind_ortvalue_input(f"past.{name}", cache)
            self._binding.bind_ortvalue_output(f"present.{name}", cache)
        self.length = 0

    def run(self, rows_NH: Floats) -> Floats:
        """Rows (N, hidden) of the tokens that follow, through the layers."""
        starts = range(0, len(rows_NH), PREFILL_ROWS)
        parts = [self._run(rows_NH[start : start + PREFILL_ROWS], self.length + start) for start in starts]
        self.length += len(rows_NH)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _run(self, rows_NH: Floats, before: int) -> Floats:
        total, binding = before + len(rows_NH), self._binding
        binding.bind_cpu_input("hidden", np.ascontiguousarray(rows_NH)[None])
        binding.bind_cpu_input("last", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total", np.array(total, np.int32))
        binding.bind_output("out", "cpu")
        self._session.run_with_iobinding(binding)
        out_NH: Floats = binding.get_outputs()[-1].numpy()[0]
        return out_NH


class OnnxDecoder:
    """A model on the CPU, over one sequence of at most `context` tokens."""

    def __init__(
        self, checkpoint: Checkpoint, context: int, bits: int = 8, threads: int = 0, cuts: Sequence[int] = ()
    ) -> None:
        """`threads` 0 for every core; `cuts`: rising depths, in layers, between the first and the last.

        Raises BundleError, InvalidInput for other widths than 4 and 8 bits.
        """
        if bits not in (4, 8):
            raise InvalidInput(f"weights of {bits} bits, expected 4 or 8")
        config = checkpoint.config
        self.vocab, self.context, self.cuts = config.vocab, min(context, config.context), tuple(cuts)
        embedding_VH = checkpoint.tensor("model.embed_tokens.weight")
        codes_VGB, self._scale_VG = quantise8(embedding_VH)
        self._codes_VGB = (codes_VGB.astype(np.int16) - 128).astype(np.int8)
        self._parts = []
        for start, stop in zip((0, *self.cuts), (*self.cuts, config.layers), strict=True):
            graph = layers_graph(checkpoint, range(start, stop), self.context, bits)
            self._parts.append(OnnxLayers(graph, config, range(start, stop), self.context, threads))
        self._waiting = [np.zeros((0, config.hidden), np.float32) for _ in self._parts]  # before each part
        self._head = open_session(head_graph(checkpoint).SerializeToString(), "output head", threads, spinning=True)
        self.ids: list[int] = []

    def fork(self) -> OnnxDecoder:
        """The same model over another sequence: weights are shared, the KV cache is new and empty."""
        fork = copy.copy(self)
        fork._parts = [part.fork() for part in self._parts]
        fork._waiting = [rows_NH[:0] for rows_NH in self._waiting]
        fork.ids = []
        return fork

    @property
    def length(self) -> int:
        """Tokens appended."""
        return len(self.ids)

    def through(self, part: int) -> int:
        """Tokens that have been through a part, counted from 0."""
        return self._parts[part].length

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens. Raises ValueError when there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length} of {self.length} tokens")
        del self.ids[length:]
        for index, part in enumerate(self._parts):
            part.length = min(part.length, length)
            self._waiting[index] = self._waiting[index][: length - part.length]

    def extend(self, ids: Sequence[int]) -> Floats:
        """Append tokens; logits (vocab,) for the one that follows. Raises InvalidInput when they do not fit."""
        self.append(ids)
        logits_V: Floats = self.logits(self.advance(len(self._parts) - 1)[-1:])[0]
        return logits_V

    def extend_all(self, ids: Sequence[int]) -> Floats:
        """Append tokens; logits (len(ids), vocab) behind each of them."""
        self.append(ids)
        return self.logits(self.advance(len(self._parts) - 1)[-len(ids) :])

    def append(self, ids: Sequence[int]) -> None:
        """Append tokens, which wait before the first layer. Raises InvalidInput when they do not fit."""
        if not ids:
            raise InvalidInput("there are no tokens to append")
        if self.length + len(ids) > self.context:
            raise InvalidInput(f"{self.length + len(ids)} tokens, the device holds at most {self.context}")
        if not 0 <= min(ids) <= max(ids) < self.vocab:
            raise InvalidInput(f"token {max(ids)} or {min(ids)} is outside of the vocabulary of {self.vocab}")
        self._wait(0, self.embed(ids))
        self.ids += ids

    def embed(self, ids: Sequence[int]) -> Floats:
        """Rows (N, hidden) of tokens before the first layer."""
        rows = np.asarray(ids)
        embedded_NGB: Floats = self._codes_VGB[rows].astype(np.float32) * self._scale_VG[rows][..., None]
        return embedded_NGB.reshape(len(ids), -1)

    def advance(self, part: int) -> Floats:
        """Bring all tokens through `part`, counted from 0, and those before it.

        The rows behind it (N, hidden) of the tokens that had not been through; behind the last part they are normed.
        """
        for index in range(part + 1):
            rows_NH = self._waiting[index]
            if len(rows_NH):
                rows_NH = self._parts[index].run(rows_NH)
            self._waiting[index] = rows_NH[:0]  # only now: should the run fail, they still wait
            if index < len(self._parts) - 1:
                self._wait(index + 1, rows_NH)
        return rows_NH

    def logits(self, rows_NH: Floats) -> Floats:
        """Logits (N, vocab) of normed rows."""
        logits_NV: Floats = self._head.run(None, {"hidden": rows_NH})[0]
        return logits_NV

    def _wait(self, part: int, rows_NH: Floats) -> None:
        before = self._waiting[part]
        self._waiting[part] = np.concatenate([before, rows_NH]) if len(before) else rows_NH
