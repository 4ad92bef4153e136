from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import Bundle
from models.errors import BundleError
from models.vision.head import Head, softmax
from models.vision.tail import load_split
from tests.conftest import Parts, random_samples

IMAGE = random_samples(1, seed=9).images[0]


@torch.inference_mode()
def test_every_segment_and_exit_equals_pytorchs(tiny_bundle: Bundle) -> None:
    head, split = Head(tiny_bundle, threads=1), load_split(tiny_bundle)
    x_CHW, x_1CHW = IMAGE, torch.from_numpy(IMAGE[None])
    for index in range(head.exits):
        x_CHW, probabilities_K = head.segment(index, x_CHW)
        x_1CHW = split.segment(index, x_1CHW)
        np.testing.assert_allclose(x_CHW, x_1CHW[0], atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(probabilities_K, split.exits[index](x_1CHW).softmax(1)[0], atol=1e-3)


@torch.inference_mode()
def test_the_encoder_equals_pytorchs(tiny_bundle: Bundle) -> None:
    head, split = Head(tiny_bundle, threads=1), load_split(tiny_bundle)
    features_1CHW = split.trunk(torch.from_numpy(IMAGE[None]))
    latent_CHW = head.encode(features_1CHW[0].numpy())
    assert latent_CHW.shape == tiny_bundle.manifest.bottleneck.latent
    np.testing.assert_allclose(latent_CHW, split.encoder(features_1CHW)[0], atol=1e-3, rtol=1e-3)


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
    lying = manifest.model_copy(update={"segments": (manifest.segments[0], wrong)})
    with pytest.raises(BundleError, match=rf"head1\.onnx: {field} shapes .* the manifest says"):
        Head(Bundle(tiny_bundle.folder, lying))


def test_a_graph_with_another_input_name_is_refused(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_bundle.read("encoder.onnx")
    import onnx

    graph = onnx.load_from_string(data)
    graph.graph.input[0].name = "y"
    for node in graph.graph.node:
        node.input[:] = ["y" if name == "x" else name for name in node.input]
    monkeypatch.setattr(
        Bundle, "read", lambda self, name: graph.SerializeToString() if name == "encoder.onnx" else READ(self, name)
    )
    with pytest.raises(BundleError, match=r"encoder\.onnx: expected one input named x"):
        Head(tiny_bundle)


READ = Bundle.read


def test_softmax_does_not_overflow() -> None:
    np.testing.assert_allclose(softmax(np.array([1000.0, 999.0], np.float32)), [0.7310586, 0.2689414], rtol=1e-6)
