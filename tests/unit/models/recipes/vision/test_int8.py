from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from isthmus.models.recipes.vision.graphs import onnx_bytes
from isthmus.models.recipes.vision.int8 import FLOAT_CONVOLUTIONS, quantise, quantise_head


def small_net(inputs: int) -> nn.Module:
    torch.manual_seed(inputs)
    convolutions = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((inputs, 8), (8, 8), (8, 8), (8, 4)))
    return nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.ReLU6())))


@pytest.fixture(scope="module")
def graphs() -> list[bytes]:
    return [onnx_bytes(small_net(n), {"x": torch.zeros(1, n, 16, 16)}, 1) for n in (3, 4)]


@pytest.fixture
def images() -> list[NDArray[np.float32]]:
    return list(np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32))


def run(graph: bytes, x_CHW: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = onnxruntime.InferenceSession(graph).run(None, {"x": x_CHW[None]})[0][0]
    return found


def float_convolutions(graph: bytes) -> int:
    """Convolutions whose weight is a plain array: quantised ones take theirs through a node."""
    model = onnx.load_from_string(graph).graph
    plain = {tensor.name for tensor in model.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    return sum(node.op_type == "Conv" and node.input[1] in plain for node in model.node)


def test_ranges_after_the_first_segment_are_those_of_its_features(
    graphs: list[bytes], images: list[NDArray[np.float32]]
) -> None:
    first, second = quantise_head(graphs, images)
    for x_CHW in images:
        features_CHW = run(graphs[0], x_CHW)
        for graph, small, source_CHW in ((graphs[0], first, x_CHW), (graphs[1], second, features_CHW)):
            wanted_CHW = run(graph, source_CHW)
            assert np.square(run(small, source_CHW) - wanted_CHW).mean() < 0.01 * wanted_CHW.var()


def test_the_first_convolutions_stay_in_float(graphs: list[bytes], images: list[NDArray[np.float32]]) -> None:
    assert [float_convolutions(graph) for graph in graphs] == [4, 4]
    assert [float_convolutions(graph) for graph in quantise_head(graphs, images)] == [FLOAT_CONVOLUTIONS, 0]


def test_weights_are_scaled_channel_by_channel(graphs: list[bytes], images: list[NDArray[np.float32]]) -> None:
    model = onnx.load_from_string(quantise(graphs[0], images, 0)).graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.initializer}
    kernels = [name for name, array in weights.items() if array.dtype == np.int8 and array.ndim == 4]
    assert len(kernels) == 4
    for name in kernels:
        assert np.abs(weights[name]).reshape(len(weights[name]), -1).max(1).min() >= 126


def test_the_same_images_give_the_same_bytes(graphs: list[bytes], images: list[NDArray[np.float32]]) -> None:
    assert quantise_head(graphs, images) == quantise_head(graphs, images)
