"""PyTorch modules -> ONNX graphs, compacted without changing a bit of their results."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

MAX_BATCH = 1024  # of a graph for any batch
LEAST_HALVED = 256  # values of an array, below which a Cast node is not worth it


def onnx_bytes(module: nn.Module, inputs: Mapping[str, Tensor], outputs: int | Sequence[str]) -> bytes:
    """A module as an ONNX graph with the shapes of `inputs`; inputs with a batch of two give a graph for any batch.

    `outputs`: their names, or their number where names do not matter.
    """
    names = [f"y{index}" for index in range(outputs)] if isinstance(outputs, int) else list(outputs)
    batches = {len(tensor) for tensor in inputs.values()}
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = {name: {0: batch} for name in inputs} if batches == {2} else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=names,
            dynamic_shapes=tuple(shapes.values()) if shapes else None,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    described: tuple[Any, ...] = (graph, *graph.node, *graph.value_info, *graph.initializer)
    for part in described:
        del part.metadata_props[:]  # stack traces with paths of this machine
    serialised: bytes = model.SerializeToString()
    return serialised


def compact(graph: bytes) -> bytes:
    """The same graph with arrays stored in float16 where that is exact; ONNX Runtime widens them once, on loading."""
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if array.dtype != np.float32 or array.size < LEAST_HALVED or not np.array_equal(half.astype(np.float32), array):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        widen = helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)
        model.graph.node.insert(0, widen)
    smaller: bytes = model.SerializeToString()
    return smaller
