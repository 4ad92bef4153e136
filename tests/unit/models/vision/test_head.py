from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head, softmax
from isthmus.models.vision.slim import FrozenSlim
from isthmus.models.vision.tail import load_split
from tests.conftest import Parts
from tests.tiny_bundle import random_images

IMAGE = random_images(1, seed=9)[0]


@torch.inference_mode()
def test_every_segment_and_exit_equals_pytorchs(tiny_bundle: Bundle) -> None:
    head, split = Head(tiny_bundle, threads=1), load_split(tiny_bundle)
    x_CHW, x_1CHW = IMAGE, torch.from_numpy(IMAGE[None])
    for index in range(head.exits):
        x_CHW, probabilities_K = head.segment(index, x_CHW)
        x_1CHW = split.segment(index, x_1CHW)
        np.testing.assert_allclose(x_CHW, x_1CHW[0], atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(probabilities_K, split.exits[index](x_1CHW).softmax(1)[0], atol=1e-3)


def test_a_run_is_all_segments_one_after_another(tiny_bundle: Bundle) -> None:
    head = Head(tiny_bundle, threads=1)
    inputs, exits_K = head.run(IMAGE)
    assert len(inputs) == head.exits + 1 and len(exits_K) == head.exits
    for index, probabilities_K in enumerate(exits_K):
        features_CHW, expected_K = head.segment(index, inputs[index])
        np.testing.assert_array_equal(features_CHW, inputs[index + 1])
        np.testing.assert_array_equal(probabilities_K, expected_K)


def test_the_int8_head_is_close_to_the_float_one_and_not_the_same(tiny_bundle: Bundle) -> None:
    float_head, head = Head(tiny_bundle, threads=1), Head(tiny_bundle, threads=1, precision="int8")
    x_CHW = IMAGE
    for index in range(head.exits):
        wanted_CHW, wanted_K = float_head.segment(index, x_CHW)
        got_CHW, got_K = head.segment(index, x_CHW)
        assert 0 < np.square(got_CHW - wanted_CHW).mean() < 0.02 * wanted_CHW.var()
        np.testing.assert_allclose(got_K, wanted_K, atol=0.1)
        x_CHW = wanted_CHW


def test_a_precision_that_the_bundle_lacks_is_refused(paper: Parts, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="precision 'int8' is not in the bundle, there is fp32"):
        Head(Bundle.open(paper.write(tmp_path / "b")), precision="int8")


@torch.inference_mode()
@pytest.mark.parametrize("width", [0, 1])
def test_the_encoder_of_the_image_equals_pytorchs_at_each_width(tiny_bundle: Bundle, width: int) -> None:
    head, split = Head(tiny_bundle, threads=1), load_split(tiny_bundle)
    latent_CHW = head.encode(0, IMAGE, width)
    assert latent_CHW.shape == tiny_bundle.manifest.taps[0].latent
    frozen = FrozenSlim(split.taps[0].encoder)  # type: ignore[arg-type]
    expected_1CHW = frozen(torch.from_numpy(IMAGE[None]), width)
    np.testing.assert_allclose(latent_CHW, expected_1CHW[0], atol=1e-3, rtol=1e-3)
    other_1CHW = frozen(torch.from_numpy(IMAGE[None]), 1 - width)
    assert not np.allclose(latent_CHW, other_1CHW[0], atol=0.05)


@torch.inference_mode()
def test_the_encoder_after_the_last_segment_equals_pytorchs(tiny_bundle: Bundle) -> None:
    head, split = Head(tiny_bundle, threads=1), load_split(tiny_bundle)
    features_1CHW = split.trunk(torch.from_numpy(IMAGE[None]))
    latent_CHW = head.encode(1, features_1CHW[0].numpy(), 0)
    assert latent_CHW.shape == tiny_bundle.manifest.taps[1].latent
    np.testing.assert_allclose(latent_CHW, split.taps[1].encoder(features_1CHW)[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("tap", "width", "most"), [(0, 2, 1), (0, -1, 1), (1, 1, 0)])
def test_a_width_that_is_not_there_is_refused(tiny_bundle: Bundle, tap: int, width: int, most: int) -> None:
    with pytest.raises(InvalidInput, match=f"width {width} does not exist, the tap has widths 0 to {most}"):
        Head(tiny_bundle, threads=1).encode(tap, IMAGE, width)


def test_a_file_that_is_no_graph_is_refused(paper: Parts, tmp_path: Path) -> None:
    opened = Bundle.open(paper.write(tmp_path / "b"))
    with pytest.raises(BundleError, match=r"head0\.onnx: not a usable ONNX graph") as caught:
        Head(opened)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["input", "output"])
def test_a_graph_of_other_shapes_is_refused(tiny_bundle: Bundle, field: str) -> None:
    manifest = tiny_bundle.manifest
    channels, height, width = getattr(manifest.segments[1], field)
    wrong = manifest.segments[1].model_copy(update={field: (channels, height, width + 1)})
    changed = manifest.model_copy(update={"segments": (manifest.segments[0], wrong)})
    words = rf"head1\.fp32\.onnx: {field} .*\[1, .*\], expected .*\[1, {channels}, {height}, {width + 1}\]"
    with pytest.raises(BundleError, match=words):
        Head(Bundle(tiny_bundle.folder, changed))


def lying(bundle: Bundle, index: int, **fields: Any) -> Bundle:
    """The bundle as if its manifest said this of a tap."""
    taps = list(bundle.manifest.taps)
    taps[index] = taps[index].model_copy(update=fields)
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"taps": tuple(taps)}))


def test_an_encoder_of_another_latent_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"light\.onnx: output .*\[1, 3, 8, 8\], expected .*\[1, 3, 8, 9\]"):
        Head(lying(tiny_bundle, 0, latent=(3, 8, 9)))


def test_an_encoder_of_the_image_after_a_segment_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"light\.onnx: inputs are named \['x', 'width'\], expected \['x'\]"):
        Head(lying(tiny_bundle, 1, encoder="light.onnx"))


def test_an_encoder_that_takes_no_width_is_refused_where_there_are_two(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"deep\.onnx: inputs are named \['x'\], expected \['x', 'width'\]"):
        Head(lying(tiny_bundle, 0, encoder="deep.onnx"))


def bent(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[onnx.GraphProto], None]) -> None:
    """Every bundle as if its graph `name` were changed so."""
    read = Bundle.read

    def reading(bundle: Bundle, asked: str) -> bytes:
        if asked != name:
            return read(bundle, asked)
        model = onnx.load_from_string(read(bundle, name))
        change(model.graph)
        return bytes(model.SerializeToString())

    monkeypatch.setattr(Bundle, "read", reading)


def test_a_graph_with_another_input_name_is_refused(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(graph: onnx.GraphProto) -> None:
        graph.input[0].name = "y"
        for node in graph.node:
            node.input[:] = ["y" if name == "x" else name for name in node.input]

    bent(monkeypatch, "deep.onnx", rename)
    with pytest.raises(BundleError, match=r"deep\.onnx: inputs are named \['y'\], expected \['x'\]"):
        Head(tiny_bundle)


def test_a_width_that_is_no_scalar_is_refused(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def widen(graph: onnx.GraphProto) -> None:
        graph.input[1].type.tensor_type.shape.dim.add().dim_value = 1

    bent(monkeypatch, "light.onnx", widen)
    with pytest.raises(BundleError, match=r"light\.onnx: input width is tensor\(int64\)\[1\], expected .*\[\]"):
        Head(tiny_bundle)


def test_a_graph_of_whole_numbers_is_refused(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def cast(graph: onnx.GraphProto) -> None:
        graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
        graph.node.insert(0, onnx.helper.make_node("Cast", ["x"], ["cast_x"], to=onnx.TensorProto.FLOAT))
        for node in list(graph.node)[1:]:
            node.input[:] = ["cast_x" if name == "x" else name for name in node.input]

    bent(monkeypatch, "deep.onnx", cast)
    with pytest.raises(BundleError, match=r"deep\.onnx: input x is tensor\(int64\).* expected tensor\(float\)"):
        Head(tiny_bundle)


def test_softmax_does_not_overflow() -> None:
    np.testing.assert_allclose(softmax(np.array([1000.0, 999.0], np.float32)), [0.7310586, 0.2689414], rtol=1e-6)
