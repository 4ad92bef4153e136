"""A language model on the device: ONNX Runtime, 8- or 4-bit weights, one sequence, KV caches that can be truncated.

    ids -> embed -> layers[0:a] -> hidden states -> layers[a:b] -> hidden states -> layers[b:] -> head -> logits

A decoder cut at depths a, b, ... runs its parts lazily: hidden states are queued before a part, and run together when
its output is needed. Knows nothing about sampling, drafts, exits or the cloud.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from isthmus.models.errors import InvalidInput
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.flops import decoder_flops
from isthmus.models.language.onnx.graph import (
    GRAPH_VERSION,
    embedding_graph,
    head_graph,
    layers_graph,
    use_int8_caches,
)
from isthmus.models.language.packing import Floats
from isthmus.models.messages import Processed
from isthmus.models.onnx_cache import GraphCache, Key
from isthmus.models.onnx_session import FLOAT, open_session, translated, zeros

CALIBRATION_TOKENS = 512
HEADROOM = 1.5  # of the largest value of a channel in an 8-bit cache over that on the calibration tokens
TINY = 1e-8  # least scale, of a channel without values
NOT_KEPT = GraphCache(None)
PREFILL_TOKENS = 64  # of one run; more only increase the memory of intermediate results


def calibration_ids(checkpoint: Checkpoint) -> list[int]:
    """Tokens that the scales of 8-bit caches are measured on."""
    generator = np.random.default_rng(0)
    ids: list[int] = generator.integers(0, checkpoint.config.vocab, CALIBRATION_TOKENS).tolist()
    return ids


def scale_of(largest: Floats) -> Floats:
    """Scales of 8-bit values from the largest magnitudes that were measured."""
    return np.maximum(largest * (HEADROOM / 127), TINY).astype(np.float32)


class OnnxLayers:
    """Consecutive layers over one sequence of at most `context` tokens, with their caches."""

    def __init__(self, session: Any, config: LlamaConfig, layers: range, context: int) -> None:
        """`session`: of a graph of these layers, for that context."""
        self._session = session
        self._shape = (1, config.kv_heads, context, config.head_dim)
        self._names = [f"{index}.{part}" for index in layers for part in ("key", "value")]
        self._config, self._count = config, len(layers)
        kinds = {node.name: node.type for node in session.get_inputs()}
        self._kind = np.float32 if kinds[f"past.{self._names[0]}"] == FLOAT else np.int8
        self._allocate()

    def fork(self) -> OnnxLayers:
        """The same layers over another sequence: weights are shared, the KV cache is new and empty."""
        fork = copy.copy(self)
        fork._allocate()
        return fork

    def _allocate(self) -> None:
        self._binding = self._session.io_binding()
        self._caches = [zeros(self._shape, self._kind) for _ in self._names]
        for name, cache in zip(self._names, self._caches, strict=True):
            self._binding.bind_ortvalue_input(f"past.{name}", cache)
            self._binding.bind_ortvalue_output(f"present.{name}", cache)
        self.length = 0
        self.processed = Processed()  # since they were made

    def largest(self) -> dict[str, Floats]:
        """Largest magnitudes (1, kv_heads, 1, head_dim) of what each cache holds, by its name."""
        caches = zip(self._names, self._caches, strict=True)
        return {name: np.abs(cache.numpy()[:, :, : self.length]).max(2, keepdims=True) for name, cache in caches}

    def run(self, states_NH: Floats) -> Floats:
        """Run the layers on hidden states (N, hidden) of the next N tokens and return their output (N, hidden).

        The last token runs by itself, as it does when the prefix before it is cached: products of one row have other
        bits than those of several.
        """
        last = len(states_NH) - 1
        starts = [*range(0, last, PREFILL_TOKENS), last]
        stops = [*starts[1:], last + 1]
        parts = [self._run(states_NH[a:b], self.length + a) for a, b in zip(starts, stops, strict=True)]
        tokens = len(states_NH)
        self.processed += Processed(tokens, decoder_flops(self._config, self.length, tokens, layers=self._count))
        self.length += len(states_NH)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _run(self, states_NH: Floats, before: int) -> Floats:
        total, binding = before + len(states_NH), self._binding
        binding.bind_cpu_input("hidden", np.ascontiguousarray(states_NH)[None])
        binding.bind_cpu_input("last", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total", np.array(total, np.int32))
        binding.bind_output("out", "cpu")
        with translated("decoder layers"):
            self._session.run_with_iobinding(binding)
        out_NH: Floats = binding.get_outputs()[-1].numpy()[0]
        return out_NH


@dataclass(frozen=True)
class Builder:
    """Makes a model's sessions, or finds them in `graphs`."""

    checkpoint: Checkpoint
    context: int
    bits: int
    kv_bits: int
    threads: int
    graphs: GraphCache

    def open(self, label: str, build: Callable[[], ModelProto], settings: Mapping[str, int | list[int]] = {}) -> Any:
        """The session of a graph of the model. `settings` tell it from others with its label. Raises BundleError."""
        model = self.checkpoint.fingerprint.hex() if self.graphs.folder else ""  # reading all weights takes time
        key: Key = {"model": model, "version": GRAPH_VERSION, **settings}
        return self.graphs.open(key, label, self.threads, build)

    def layers(self, layers: range, states: Callable[[], Floats]) -> OnnxLayers:
        """`states`: hidden states (N, hidden) before the layers, of a text that 8-bit caches are measured on."""
        settings = {"context": self.context, "bits": self.bits, "kv_bits": self.kv_bits}
        return self._over(
            self.open("decoder layers", lambda: self._graph(layers, states), {"layers": [*layers], **settings}), layers
        )

    def _graph(self, layers: range, states: Callable[[], Floats]) -> ModelProto:
        graph = layers_graph(self.checkpoint, layers, self.context, self.bits)
        if self.kv_bits == 32:
            return graph
        exact = self._over(open_session(graph.SerializeToString(), "decoder layers", self.threads), layers)
        exact.run(states())
        use_int8_caches(graph, {name: scale_of(largest) for name, largest in exact.largest().items()})
        return graph

    def _over(self, session: Any, layers: range) -> OnnxLayers:
        return OnnxLayers(session, self.checkpoint.config, layers, self.context)


class OnnxDecoder:
    """A whole model on the CPU, over one sequence of at most `context` tokens."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        context: int,
        bits: int = 8,
        threads: int = 0,
        cuts: Sequence[int] = (),
        *,
        kv_bits: int = 32,
        graphs: GraphCache = NOT_KEPT,
    ) -> None:
        """`bits` of a weight: 4 or 8. `threads`: 0 for every core. `cuts`: rising depths at which the layers are cut.

        `kv_bits` of a key or value in the cache: 8 or 32. `graphs` keeps what is built for the next start.
        Raises BundleError; InvalidInput for other `bits` or `kv_bits`.
        """
        if bits not in (4, 8) or kv_bits not in (8, 32):
            raise InvalidInput(f"weights of {bits} bits, expected 4 or 8; a cache of {kv_bits} bits, expected 8 or 32")
        config = checkpoint.config
        self.vocab, self.context, self.cuts = config.vocab, min(context, config.context), tuple(cuts)
        builder = Builder(checkpoint, self.context, bits, kv_bits, threads, graphs)
        self._embedding = builder.open("embedding", lambda: embedding_graph(checkpoint))
        self._parts: list[OnnxLayers] = []
        for start, stop in zip((0, *self.cuts), (*self.cuts, config.layers), strict=True):
            self._parts.append(builder.layers(range(start, stop), lambda: self._states_of(calibration_ids(checkpoint))))
        self._queued = [np.zeros((0, config.hidden), np.float32) for _ in self._parts]  # before each part
        self._head = builder.open("output head", lambda: head_graph(checkpoint))
        self._config, self._head_flops = config, 0
        self.ids: list[int] = []

    def _states_of(self, ids: Sequence[int]) -> Floats:
        """Hidden states (N, hidden) of a text after the parts that there are, which stay empty."""
        states_NH = self.embed(ids[: self.context])
        for part in self._parts:
            states_NH = part.run(states_NH)
            part.length = 0
        return states_NH

    def fork(self) -> OnnxDecoder:
        """The same model over another sequence: weights are shared, the KV cache is new and empty."""
        fork = copy.copy(self)
        fork._parts = [part.fork() for part in self._parts]
        fork._queued = [states_NH[:0] for states_NH in self._queued]
        fork.ids, fork._head_flops = [], 0
        return fork

    @property
    def length(self) -> int:
        """Number of tokens appended."""
        return len(self.ids)

    @property
    def processed(self) -> Processed:
        """What was computed since the decoder was made: tokens through the first layers, operations of all parts."""
        parts = [part.processed for part in self._parts]
        return Processed(parts[0].tokens, sum(part.flops for part in parts) + self._head_flops)

    def through(self, part: int) -> int:
        """Number of tokens that a part has processed; `part` counts from 0."""
        return self._parts[part].length

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens only. Raises ValueError when there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length} of {self.length} tokens")
        del self.ids[length:]
        for index, part in enumerate(self._parts):
            part.length = min(part.length, length)
            self._queued[index] = self._queued[index][: length - part.length]

    def extend(self, ids: Sequence[int]) -> Floats:
        """Append tokens and return logits (vocab,) for the next one. Raises InvalidInput when they do not fit."""
        self.append(ids)
        logits_V: Floats = self.logits(self.advance(len(self._parts) - 1)[-1:])[0]
        return logits_V

    def extend_all(self, ids: Sequence[int]) -> Floats:
        """Append tokens and return logits (len(ids), vocab) after each. Raises InvalidInput when they do not fit."""
        self.append(ids)
        return self.logits(self.advance(len(self._parts) - 1)[-len(ids) :])

    def append(self, ids: Sequence[int]) -> None:
        """Queue tokens before the first layer. Raises InvalidInput when they do not fit."""
        if not ids:
            raise InvalidInput("there are no tokens to append")
        if self.length + len(ids) > self.context:
            raise InvalidInput(f"{self.length + len(ids)} tokens, the device holds at most {self.context}")
        if not 0 <= min(ids) <= max(ids) < self.vocab:
            raise InvalidInput(f"token {max(ids)} or {min(ids)} is outside the vocabulary of {self.vocab}")
        self._enqueue(0, self.embed(ids))
        self.ids += ids

    def embed(self, ids: Sequence[int]) -> Floats:
        """Embeddings (N, hidden) of tokens."""
        with translated("embedding"):
            embedded_NH: Floats = self._embedding.run(None, {"ids": np.asarray(ids, np.int64)})[0]
        return embedded_NH

    def advance(self, part: int) -> Floats:
        """Run all queued tokens through `part`, counted from 0, and the parts before it.

        Returns the output of `part` (N, hidden) for the tokens that it had not processed; that of the last part is
        normed.
        """
        for index in range(part + 1):
            states_NH = self._queued[index]
            if len(states_NH):
                states_NH = self._parts[index].run(states_NH)
            self._queued[index] = states_NH[:0]  # only now, so that they stay queued when the run fails
            if index < len(self._parts) - 1:
                self._enqueue(index + 1, states_NH)
        return states_NH

    def logits(self, states_NH: Floats) -> Floats:
        """Logits (N, vocab) of normed hidden states."""
        with translated("output head"):
            logits_NV: Floats = self._head.run(None, {"hidden": states_NH})[0]
        self._head_flops += decoder_flops(self._config, 0, 0, layers=0, decided=len(states_NH))
        return logits_NV

    def _enqueue(self, part: int, states_NH: Floats) -> None:
        before = self._queued[part]
        self._queued[part] = np.concatenate([before, states_NH]) if len(before) else states_NH
