"""ONNX Runtime sessions: the one place that opens graphs, checks what they take and give, and names its errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from isthmus.models.errors import BundleError, Overloaded

# ONNX Runtime sends telemetry unless this is set before it is loaded; its own switch comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

UNBOUNDED = (b"Loop", b"Scan")  # operators that repeat a part of the graph; `If` runs one of two parts once
OP_TYPE = re.compile(
    rb"(?:\x22|\xa2\x80{0,3}\x00)(?:\x04|\x84\x80{0,8}\x00)\Z"
)  # field 4, 4 bytes; numbers may be padded
OP_TYPE_BYTES = 16

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
ANY = -1  # a size that may be fixed or not
FLOAT, INT64 = "tensor(float)", "tensor(int64)"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and element type of a graph's input or output.

    A size of None stands for a dimension of any size; ANY also for one of a size that only the graph knows.
    """

    shape: tuple[int | None, ...]
    type: str = FLOAT

    def admits(self, node: Any) -> bool:
        """Whether a session's input or output is such a tensor."""
        if node.type != self.type or len(node.shape) != len(self.shape):
            return False
        pairs = zip(node.shape, self.shape, strict=True)
        return all(
            size == ANY or (not isinstance(found, int) if size is None else found == size) for found, size in pairs
        )

    def __str__(self) -> str:
        return f"{self.type}[{', '.join('any' if size in (None, ANY) else str(size) for size in self.shape)}]"


def open_session(
    graph: bytes,
    label: str,
    threads: int,
    *,
    spinning: bool = False,
    cuda: int | None = None,
    weights: Path | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession`; `threads` 0 for every core. `label` names the graph in errors.

    With `cuda` on that CUDA device, where this ONNX Runtime can use it (`uses_cuda`), else on the CPU.

    With `spinning`, threads spin while they wait for work within a run, which is faster for many small operators.
    Between runs they never spin: it drains the battery and takes the cores from the next session's run.
    `weights`: the folder of constants that the graph has in files, which are mapped into memory.
    Raises BundleError when `graph` is not a graph that ONNX Runtime can run, or holds one of UNBOUNDED.
    """
    check_bounded(graph, label)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")  # ORT's own format hides the operators
    if spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    try:
        return onnxruntime.InferenceSession(graph, options, providers=providers(cuda))
    except Exception as error:  # onnxruntime's own classes share no public base
        reason = str(error).splitlines()[0][:200]
        raise BundleError(f"{label}: not a usable ONNX graph: {reason}") from error


def providers(cuda: int | None) -> list[str | tuple[str, dict[str, int]]]:
    """What may run a graph, the first wish first. ONNX Runtime itself leaves out what it cannot load."""
    if cuda is None or CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return [CPU_PROVIDER]
    return [(CUDA_PROVIDER, {"device_id": cuda, "use_tf32": 0}), CPU_PROVIDER]


def uses_cuda(session: Any) -> bool:
    """Whether a session computes on a CUDA device."""
    return CUDA_PROVIDER in session.get_providers()


def check_bounded(graph: bytes, label: str) -> None:
    """Raise BundleError when a serialised graph holds an operator of UNBOUNDED: even opening it may never end."""
    for name in UNBOUNDED:
        at = -1
        while (at := graph.find(name, at + 1)) >= 0:
            if OP_TYPE.search(graph[max(at - OP_TYPE_BYTES, 0) : at]):
                raise BundleError(f"{label}: the graph has the operator {name.decode()}, which may run for ever")


@contextmanager
def translated(label: str) -> Iterator[None]:
    """Raise BundleError, or Overloaded when memory is exhausted, for whatever ONNX Runtime raises in a run.

    Its classes share no public base.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if isinstance(error, MemoryError) or "memory" in reason or "bad_alloc" in reason:
            raise Overloaded(f"{label}: not enough memory to run the graph") from error
        raise BundleError(f"{label}: the graph failed: {reason}") from error


def check_signature(
    session: Any, label: str, inputs: Mapping[str, TensorSpec], outputs: Sequence[TensorSpec] | Mapping[str, TensorSpec]
) -> None:
    """Raise BundleError unless a session has exactly these inputs, by name, and these outputs, in order.

    Outputs of a mapping have these names too.
    """
    names = [node.name for node in session.get_inputs()]
    if sorted(names) != sorted(inputs):
        raise BundleError(f"{label}: inputs are named {names}, expected {list(inputs)}")
    if isinstance(outputs, Mapping):
        if (found := [node.name for node in session.get_outputs()]) != list(outputs):
            raise BundleError(f"{label}: outputs are named {found}, expected {list(outputs)}")
        outputs = list(outputs.values())
    if len(session.get_outputs()) != len(outputs):
        raise BundleError(f"{label}: {len(session.get_outputs())} outputs, expected {len(outputs)}")
    pairs = [("input", node, inputs[node.name]) for node in session.get_inputs()]
    pairs += [("output", node, spec) for node, spec in zip(session.get_outputs(), outputs, strict=True)]
    for side, node, spec in pairs:
        if not spec.admits(node):
            raise BundleError(f"{label}: {side} {node.name} is {node.type}{node.shape}, expected {spec}")


def zeros(shape: Sequence[int], dtype: DTypeLike = np.float32) -> Any:
    """Zeros as an `OrtValue`, to be bound as a session's input and output."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
