"""The head's segments in 8 bits: static quantisation, per channel for weights, per tensor for activations.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(CVPR 2018), as ONNX Runtime does it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from isthmus.models.onnx_session import open_session

FLOAT_CONVOLUTIONS = 3  # of the first segment: stem and first block cause most of the error and take little of the time

Floats = NDArray[np.float32]


class Inputs(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Inputs on which activation ranges are measured."""

    def __init__(self, inputs: Sequence[Floats]) -> None:
        self._rest: Iterator[Floats] = iter(inputs)

    def get_next(self) -> dict[str, Floats] | None:
        x_CHW = next(self._rest, None)
        return None if x_CHW is None else {"x": x_CHW[None]}


def quantise_head(graphs: Sequence[bytes], images: Sequence[Floats]) -> list[bytes]:
    """The segments' ONNX graphs in 8 bits. Ranges are measured on `images` (3, H, W) and their float features."""
    quantised, inputs = [], list(images)
    for index, graph in enumerate(graphs):
        quantised.append(quantise(graph, inputs, 0 if index else FLOAT_CONVOLUTIONS))
        session = open_session(graph, f"segment {index}", 0)
        inputs = [session.run(None, {"x": x_CHW[None]})[0][0] for x_CHW in inputs]
    return quantised


def quantise(graph: bytes, inputs: Sequence[Floats], in_float: int) -> bytes:
    """One graph in 8 bits; its first `in_float` convolutions stay in float32."""
    model = onnx.load_from_string(graph)
    add_pre_process_metadata(model)  # constants are folded and batch norms fused as exported
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            path,
            Inputs(inputs),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=convolutions[:in_float],
        )
        return path.read_bytes()
