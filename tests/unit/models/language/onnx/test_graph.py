"""Quantised weights: how far they are from the originals, how they are packed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.onnx import graph as onnx_graph
from isthmus.models.language.onnx.graph import Graph, head_graph, layers_graph
from isthmus.models.language.packing import BLOCK, Bytes, Floats, in_pairs, quantise4, quantise8
from tests.bench.tiny_llama import write_tiny_llama

matrices = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda shape: nps.arrays(
        np.float32, (shape[0], shape[1] * BLOCK), elements=st.floats(-(2**100), 2**100, width=32), fill=st.just(0.0)
    )
)

SIDES = pytest.mark.parametrize("side", [0.0, 1.0, -1.0])


def on_one_side(weight_OI: Floats, side: float) -> Floats:
    """As they are, or all above zero, or all below."""
    return weight_OI if side == 0 else np.asarray((np.abs(weight_OI) + 1) * side, np.float32)


def unpacked(pairs: Bytes, count: int) -> Bytes:
    """The first `count` codes along the last axis, low half first."""
    both = np.stack([pairs & 15, pairs >> 4], axis=-1)
    return np.asarray(both.reshape(*pairs.shape[:-1], -1)[..., :count])


def expand8(codes_OGB: Bytes, scale_OG: Floats) -> Floats:
    values = (codes_OGB.astype(np.float64) - 128) * scale_OG[..., None]
    return np.asarray(values.reshape(len(codes_OGB), -1))


def expand4(pairs: Bytes, scale_OG: Floats, zeros: Bytes) -> Floats:
    zero_OG = unpacked(zeros, scale_OG.shape[1]).astype(np.float64)
    codes_OGB = unpacked(pairs, BLOCK)
    return np.asarray(((codes_OGB - zero_OG[..., None]) * scale_OG[..., None]).reshape(len(pairs), -1))


@given(weight_OI=matrices)
@SIDES
def test_8_bits_are_within_half_a_step(side: float, weight_OI: Floats) -> None:
    weight_OI = on_one_side(weight_OI, side)
    codes_OGB, scale_OG = quantise8(weight_OI)
    rows, groups = len(weight_OI), weight_OI.shape[1] // BLOCK
    assert (codes_OGB.shape, codes_OGB.dtype) == ((rows, groups, BLOCK), np.uint8)
    assert (scale_OG.shape, scale_OG.dtype) == ((rows, groups), np.float32)
    assert codes_OGB.min() >= 1  # around 128: 0 would be a code of its own below
    largest = np.abs(weight_OI).reshape(rows, groups, BLOCK).max(-1)
    assert (scale_OG <= largest / 127 * 1.000001 + 1.1e-12).all()
    error = np.abs(expand8(codes_OGB, scale_OG) - weight_OI)
    assert (error <= scale_OG.repeat(BLOCK, 1) * 0.50002).all()


@given(weight_OI=matrices)
@SIDES
def test_4_bits_are_within_half_a_step(side: float, weight_OI: Floats) -> None:
    weight_OI = on_one_side(weight_OI, side)
    pairs, scale_OG, zeros = quantise4(weight_OI)
    rows, groups = len(weight_OI), weight_OI.shape[1] // BLOCK
    assert (pairs.shape, pairs.dtype) == ((rows, groups, BLOCK // 2), np.uint8)
    assert (zeros.shape, zeros.dtype) == ((rows, (groups + 1) // 2), np.uint8)
    blocks_OGB = weight_OI.reshape(rows, groups, BLOCK)
    span = np.maximum(blocks_OGB.max(-1), 0) - np.minimum(blocks_OGB.min(-1), 0)
    assert (scale_OG <= span / 15 * 1.000001 + 1.1e-12).all()
    error = np.abs(expand4(pairs, scale_OG, zeros) - weight_OI)
    assert (error <= scale_OG.repeat(BLOCK, 1) * 0.50001).all()


@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-45])
def test_nothing_stays_nothing(zero: float) -> None:
    weight_OI = np.full((2, BLOCK), zero, np.float32)
    assert np.abs(expand8(*quantise8(weight_OI))).max() == 0
    assert np.abs(expand4(*quantise4(weight_OI))).max() == 0


def test_packing_is_golden() -> None:
    """As MatMulNBits reads them: 8 bits around 128; 4 bits in pairs, the first in the low half; zero points alike."""
    ramp = np.arange(BLOCK, dtype=np.float32) - 16
    codes, scale_OG = quantise8(ramp[None])
    assert codes.tobytes().hex() == "0109111921293139404850586068707880889098a0a8b0b8c0c7cfd7dfe7eff7"
    assert scale_OG.tolist() == [[np.float32(16 / 127)]]
    weight_OI = np.tile(np.arange(16, dtype=np.float32), 6).reshape(1, 3 * BLOCK)
    weight_OI[0, BLOCK : 2 * BLOCK] -= 5
    weight_OI[0, 2 * BLOCK :] -= 15
    pairs, scale_OG, zeros = quantise4(weight_OI)
    assert scale_OG.tolist() == [[1, 1, 1]]
    assert pairs.tobytes() == bytes.fromhex("1032547698badcfe") * 6
    assert zeros.tobytes() == bytes([0x50, 0x0F])


def test_pairs() -> None:
    assert in_pairs(np.array([[1, 2, 3]], np.uint8)).tolist() == [[0x21, 0x03]]
    assert in_pairs(np.array([[15, 0], [0, 15]], np.uint8)).tolist() == [[0x0F], [0xF0]]


@pytest.mark.parametrize("columns", [1, 31, 33, 48])
def test_columns_that_are_no_whole_blocks(columns: int) -> None:
    for quantise in (quantise8, quantise4):
        with pytest.raises(BundleError, match=f"a matrix has {columns} columns.*multiple of 32"):
            quantise(np.ones((2, columns), np.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_model_of_odd_width(tmp_path: Path, bits: int) -> None:
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path, ffn=72))
    with pytest.raises(BundleError, match="a matrix has 72 columns"):
        layers_graph(checkpoint, range(2), 16, bits)
    narrow = Checkpoint.open(write_tiny_llama(tmp_path, hidden=48, heads=3, kv_heads=1))
    with pytest.raises(BundleError, match="a matrix has 48 columns"):
        head_graph(narrow)


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path))
    size = layers_graph(checkpoint, range(2), 16, 8).ByteSize()
    monkeypatch.setattr(onnx_graph, "MAX_GRAPH_BYTES", size)
    assert layers_graph(checkpoint, range(2), 16, 8).ByteSize() == size
    monkeypatch.setattr(onnx_graph, "MAX_GRAPH_BYTES", size // 2)
    with pytest.raises(BundleError, match=f"more than {size // 2} bytes, the limit of a graph"):
        layers_graph(checkpoint, range(2), 16, 8)
    monkeypatch.setattr(onnx_graph, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(BundleError, match="the limit of a graph"):
        head_graph(checkpoint)


def test_the_limit_counts_every_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "MAX_GRAPH_BYTES", 16)
    graph = Graph()
    graph.constant("a", np.zeros(2, np.float32))
    graph.constant("b", np.zeros(2, np.float32))
    with pytest.raises(BundleError):
        graph.constant("c", np.zeros(1, np.uint8))


@pytest.mark.parametrize("head_dim", [2, 8, 20, 24])
def test_heads_that_the_operator_does_not_take(tmp_path: Path, head_dim: int) -> None:
    checkpoint = Checkpoint.open(write_tiny_llama(tmp_path, heads=16, head_dim=head_dim))
    with pytest.raises(BundleError, match=f"head size is {head_dim}, a device needs a multiple of 16"):
        layers_graph(checkpoint, range(2), 16, 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_graph_of_some_layers(tmp_path: Path, bits: int) -> None:
    """Only these layers' caches, in order: the graph of a cut."""
    model = layers_graph(Checkpoint.open(write_tiny_llama(tmp_path, layers=3)), range(1, 3), 16, bits)
    caches = ["1.key", "1.value", "2.key", "2.value"]
    assert [value.name for value in model.graph.input] == [
        "hidden",
        "last",
        "total",
        *(f"past.{name}" for name in caches),
    ]
    assert [value.name for value in model.graph.output] == ["out", *(f"present.{name}" for name in caches)]
    assert not any(initialiser.name.startswith("0.") for initialiser in model.graph.initializer)
    settings = [
        {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    ]
    assert len(settings) == 8 and {each["bits"] for each in settings} == {bits}
