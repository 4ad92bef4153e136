from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isthmus.models.errors import BundleError
from isthmus.models.onnx_session import TensorSpec
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.graphs import open_graph
from tests.conftest import Parts


def test_a_graph_of_the_bundle_runs(tiny_bundle: Bundle) -> None:
    tap, source = tiny_bundle.manifest.taps[1], tiny_bundle.manifest.segments[1].output
    inputs, outputs = {"x": TensorSpec((1, *source))}, [TensorSpec((1, *tap.latent))]
    session = open_graph(tiny_bundle, tap.encoder, 1, inputs, outputs)
    (latent_1CHW,) = session.run(None, {"x": np.zeros((1, *source), np.float32)})
    assert latent_1CHW.shape == (1, *tap.latent)


def test_a_graph_with_another_signature_is_named_by_its_path(tiny_bundle: Bundle) -> None:
    name = tiny_bundle.manifest.taps[1].encoder
    with pytest.raises(BundleError, match="inputs are named") as caught:
        open_graph(tiny_bundle, name, 1, {"y": TensorSpec((1,))}, [])
    assert str(caught.value).startswith(f"{tiny_bundle.folder / name}: ")


def test_a_file_that_is_no_graph_is_named_by_its_path(paper: Parts, tmp_path: Path) -> None:
    bundle = Bundle.open(paper.write(tmp_path / "b"))
    with pytest.raises(BundleError, match=r"head0\.onnx: not a usable ONNX graph"):
        open_graph(bundle, "head0.onnx", 1, {}, [])
