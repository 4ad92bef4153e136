from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from isthmus.models.recipes.vision.slim_onnx import slim_onnx
from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.slim import FrozenSlim, SlimEncoder

IMAGE = (3, 66, 60)  # odd sides in the middle: padding is not the same on both
LATENT = (5, 5, 4)
WIDTHS = (0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def encoder() -> SlimEncoder:
    torch.manual_seed(0)
    blocks = EfficientNetLite("efficientnet_lite0", 2).blocks[:7]
    encoder = SlimEncoder(blocks, LATENT[0], WIDTHS)
    for norm in (module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.bias, std=0.3)
    return encoder.eval()


@pytest.fixture(scope="module")
def graph(encoder: SlimEncoder) -> bytes:
    return slim_onnx(encoder, IMAGE, LATENT)


@pytest.mark.parametrize("width", range(3))
def test_the_graph_computes_what_the_encoder_does(encoder: SlimEncoder, graph: bytes, width: int) -> None:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(width).uniform(-1, 1, (1, *IMAGE)).astype(np.float32)
    (found,) = session.run(None, {"x": x, "width": np.array(width, np.int64)})
    with torch.no_grad():
        wanted = FrozenSlim(encoder)(torch.from_numpy(x), width).numpy()
    assert found.shape == (1, *LATENT)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * wanted.std())


def test_weights_are_in_the_graph_once(encoder: SlimEncoder, graph: bytes) -> None:
    kinds = Counter[int]()
    for initializer in onnx.load_from_string(graph).graph.initializer:
        kinds[initializer.data_type] += int(np.prod(initializer.dims))
    state = FrozenSlim(encoder).state_dict()
    assert kinds[onnx.TensorProto.INT8] == sum(t.numel() for t in state.values() if t.dtype is torch.int8)
    assert kinds[onnx.TensorProto.FLOAT16] == sum(t.numel() for t in state.values() if t.dtype is torch.float16)
    assert kinds[onnx.TensorProto.FLOAT] == 2  # the bounds of ReLU6


def test_the_graph_is_the_same_every_time(encoder: SlimEncoder, graph: bytes) -> None:
    assert slim_onnx(encoder, IMAGE, LATENT) == graph


def test_one_width_needs_no_choice() -> None:
    torch.manual_seed(0)
    blocks = EfficientNetLite("efficientnet_lite0", 2).blocks[:2]
    only = SlimEncoder(blocks, 3, (1.0,)).eval()
    session = onnxruntime.InferenceSession(slim_onnx(only, (3, 16, 16), (3, 4, 4)))
    x = np.ones((1, 3, 16, 16), np.float32)
    (found,) = session.run(None, {"x": x, "width": np.array(0, np.int64)})
    with torch.no_grad():
        np.testing.assert_allclose(found, FrozenSlim(only)(torch.from_numpy(x), 0).numpy(), rtol=1e-3, atol=1e-4)
