"""A language model on the device: ONNX Runtime, 8- or 4-bit weights, one session, a cache that can be rolled back.

Knows nothing about sampling, drafts or the cloud.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from models.errors import InvalidInput
from models.language.checkpoint import Checkpoint
from models.language.onnx_graph import Floats, head_graph, layers_graph, quantise8

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it reports to its makers unless told not to before it is loaded
import onnxruntime as ort

PREFILL_ROWS = 64  # tokens a run: more would only hold a larger intermediate


class OnnxDecoder:
    """All layers of a model on the CPU, over one sequence of at most `context` tokens."""

    def __init__(self, checkpoint: Checkpoint, context: int, bits: int = 8, threads: int = 0) -> None:
        """`threads` 0 for every core. Raises BundleError, InvalidInput for other widths than 4 and 8 bits."""
        if bits not in (4, 8):
            raise InvalidInput(f"weights of {bits} bits, expected 4 or 8")
        config = checkpoint.config
        self.vocab, self.context = config.vocab, min(context, config.context)
        embedding_VH = checkpoint.tensor("model.embed_tokens.weight")
        codes_VGB, self._scale_VG = quantise8(embedding_VH)
        self._codes_VGB = (codes_VGB.astype(np.int16) - 128).astype(np.int8)
        self._layers = session(layers_graph(checkpoint, range(config.layers), self.context, bits), threads)
        self._head = session(head_graph(checkpoint), threads)
        self._binding = self._layers.io_binding()
        shape = (1, config.kv_heads, self.context, config.head_dim)
        self._caches = [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for _ in range(2 * config.layers)]
        names = [f"{index}.{part}" for index in range(config.layers) for part in ("key", "value")]
        for name, cache in zip(names, self._caches, strict=True):
            self._binding.bind_ortvalue_input(f"past.{name}", cache)
            self._binding.bind_ortvalue_output(f"present.{name}", cache)
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens. Raises ValueError when there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length} of {self.length} tokens")
        self.length = length

    def extend(self, ids: Sequence[int]) -> Floats:
        """Append tokens; logits (vocab,) for the one that follows. Raises InvalidInput when they do not fit."""
        logits_V: Floats = self.logits(self._hidden(ids)[-1:])[0]
        return logits_V

    def extend_all(self, ids: Sequence[int]) -> Floats:
        """Append tokens; logits (len(ids), vocab) behind each of them."""
        return self.logits(self._hidden(ids))

    def logits(self, hidden_NH: Floats) -> Floats:
        """Logits (N, vocab) of rows behind the last layer."""
        logits_NV: Floats = self._head.run(None, {"hidden": hidden_NH})[0]
        return logits_NV

    def _hidden(self, ids: Sequence[int]) -> Floats:
        if not ids:
            raise InvalidInput("there are no tokens to append")
        if self.length + len(ids) > self.context:
            raise InvalidInput(f"{self.length + len(ids)} tokens, the device holds at most {self.context}")
        if not 0 <= min(ids) <= max(ids) < self.vocab:
            raise InvalidInput(f"token {max(ids)} or {min(ids)} is outside of the vocabulary of {self.vocab}")
        parts = [self._run(ids[start : start + PREFILL_ROWS]) for start in range(0, len(ids), PREFILL_ROWS)]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _run(self, ids: Sequence[int]) -> Floats:
        total, rows = self.length + len(ids), np.asarray(ids)
        embedded_NGB = self._codes_VGB[rows].astype(np.float32) * self._scale_VG[rows][..., None]
        binding = self._binding
        binding.bind_cpu_input("hidden", embedded_NGB.reshape(1, len(ids), -1))
        binding.bind_cpu_input("last", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total", np.array(total, np.int32))
        binding.bind_output("out", "cpu")
        self._layers.run_with_iobinding(binding)
        self.length = total
        hidden_1NH: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        hidden_NH: Floats = hidden_1NH[0]
        return hidden_NH


def session(model: ModelProto, threads: int) -> ort.InferenceSession:
    """A graph ready to run on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that go on spinning after a run take the cores from the next one: layers, head, layers, ... at half speed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
