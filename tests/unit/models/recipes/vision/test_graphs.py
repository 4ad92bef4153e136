from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from torch import nn

from isthmus.models.recipes.vision.graphs import compact, onnx_bytes


def run(graph: bytes, count: int) -> np.ndarray:
    inputs = {"x": np.random.default_rng(0).normal(size=(count, 40)).astype(np.float32)}
    answer: np.ndarray = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    return answer


def test_a_batch_of_two_stands_for_any_and_one_of_one_for_itself() -> None:
    net = nn.Linear(40, 20)
    any_size = onnx_bytes(net, {"x": torch.zeros(2, 40)}, outputs=1)
    assert [run(any_size, count).shape for count in (1, 7)] == [(1, 20), (7, 20)]
    one = onnxruntime.InferenceSession(onnx_bytes(net, {"x": torch.zeros(1, 40)}, outputs=1))
    assert one.get_inputs()[0].shape == [1, 40]


def test_a_graph_tells_nothing_of_where_it_was_made() -> None:
    assert b"site-packages" not in onnx_bytes(nn.Linear(40, 20), {"x": torch.zeros(1, 40)}, outputs=1)


def test_a_compact_graph_computes_the_same_bits() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight.half().float())
    graph = onnx_bytes(net, {"x": torch.zeros(2, 40)}, outputs=1)
    small = compact(graph)
    saved = len(graph) - len(small)
    assert 2 * 40 * 30 - 400 < saved <= 2 * 40 * 30, "the first matrix is what float16 holds, the second is not"
    assert np.array_equal(run(graph, 5), run(small, 5))
