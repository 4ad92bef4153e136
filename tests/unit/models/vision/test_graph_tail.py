from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.recipes.vision.graphs import onnx_bytes
from isthmus.models.torch_device import CPU
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.graph_tail import GraphTail
from isthmus.models.vision.tail import open_tail
from tests.conftest import Parts

IMAGE, LATENT = (3, 8, 8), (2, 4, 4)


class FromImage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))[:, :2]


class FromLatent(nn.Module):
    """The rate tells how much the latent counts."""

    def forward(self, latent: Tensor, rate: Tensor) -> Tensor:
        return latent.mean((2, 3)) * (1 + rate[:, None])


@pytest.fixture(scope="module")
def graphs() -> dict[str, bytes]:
    latent = {"latent": torch.zeros(2, *LATENT), "rate": torch.zeros(2, dtype=torch.long)}
    return {
        "image.onnx": onnx_bytes(FromImage(), {"x": torch.zeros(2, *IMAGE)}, 1),
        "deep_tail.onnx": onnx_bytes(FromLatent(), latent, 1),
    }


@pytest.fixture
def parts(paper: Parts, graphs: dict[str, bytes]) -> Parts:
    """The paper bundle, with graphs in place of weights."""
    del paper.manifest["weights"], paper.files["weights.safetensors"]
    paper.manifest["graphs"] = {"image": "image.onnx", "taps": ["deep_tail.onnx"]}
    paper.files.update(graphs)
    return paper


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = torch.from_numpy(logits).softmax(-1).numpy()
    return found


def test_images_and_latents_are_answered_in_batches_of_any_size(parts: Parts, tmp_path: Path) -> None:
    tail = open_tail(Bundle.open(parts.write(tmp_path / "b")))
    assert isinstance(tail, GraphTail)
    rng = np.random.default_rng(0)
    for count in (1, 2, 5):
        images = list(rng.normal(size=(count, *IMAGE)).astype(np.float32))
        (answer_BK,) = tail.images_to_tasks(images, [0])
        np.testing.assert_allclose(answer_BK, softmax(np.stack(images).mean((2, 3))[:, :2]), rtol=1e-5)
        latents, rates = list(rng.normal(size=(count, *LATENT)).astype(np.float32)), list(range(count))
        wanted_BK = softmax(np.stack(latents).mean((2, 3)) * (1 + np.arange(count)[:, None]))
        (answer_BK,) = tail.latents_to_tasks(0, latents, rates, [0])
        np.testing.assert_allclose(answer_BK, wanted_BK, rtol=1e-5)


def test_without_a_provider_for_cuda_the_cpu_computes(parts: Parts, tmp_path: Path) -> None:
    tail = open_tail(Bundle.open(parts.write(tmp_path / "b")), torch.device("cuda", 1))
    assert tail.device == CPU
    assert tail.answer_images([np.zeros(IMAGE, np.float32)]).shape == (1, 2)


def test_there_is_only_one_task(parts: Parts, tmp_path: Path) -> None:
    tail = GraphTail(Bundle.open(parts.write(tmp_path / "b")), 1)
    with pytest.raises(InvalidInput, match=r"tasks \[0, 1\] were requested"):
        tail.images_to_tasks([np.zeros(IMAGE, np.float32)], [0, 1])


class FromTable(nn.Module):
    """Knows two rates."""

    def forward(self, latent: Tensor, rate: Tensor) -> Tensor:
        return latent.mean((2, 3)) + torch.ones(2, 2)[rate]


def test_a_graph_that_fails_on_an_input_says_so_as_pytorch_does(parts: Parts, tmp_path: Path) -> None:
    inputs = {"latent": torch.zeros(2, *LATENT), "rate": torch.zeros(2, dtype=torch.long)}
    parts.files["deep_tail.onnx"] = onnx_bytes(FromTable(), inputs, 1)
    tail = GraphTail(Bundle.open(parts.write(tmp_path / "b")), 1)
    assert tail.answer_latents(0, [np.zeros(LATENT, np.float32)], [1]).shape == (1, 2)
    with pytest.raises(BundleError, match="tail: the graph failed: .*Gather"):
        tail.answer_latents(0, [np.zeros(LATENT, np.float32)], [99])


def swap(parts: Parts) -> None:
    parts.files["deep_tail.onnx"] = parts.files["image.onnx"]


def no_graph(parts: Parts) -> None:
    parts.files["image.onnx"] = b"not an ONNX graph"


def another_size(parts: Parts) -> None:
    parts.files["image.onnx"] = onnx_bytes(FromImage(), {"x": torch.zeros(2, 3, 16, 16)}, 1)


def another_count(parts: Parts) -> None:
    parts.files["image.onnx"] = onnx_bytes(nn.Flatten(), {"x": torch.zeros(2, *IMAGE)}, 1)


def one_image(parts: Parts) -> None:
    parts.files["image.onnx"] = onnx_bytes(FromImage(), {"x": torch.zeros(1, *IMAGE)}, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap, r"deep_tail\.onnx: inputs are named \['x'\], expected \['latent', 'rate'\]"),
        (no_graph, r"image\.onnx: not a usable ONNX graph"),
        (another_size, r"image\.onnx: input x is .*16, 16\], expected .*8, 8\]"),
        (another_count, r"image\.onnx: output .*192\], expected .*\[any, 2\]"),
        (one_image, r"image\.onnx: input x is .*\[1, 3, 8, 8\], expected .*\[any, 3, 8, 8\]"),
    ],
)
def test_graphs_that_do_not_fit_are_refused(
    parts: Parts, tmp_path: Path, change: Callable[[Parts], None], words: str
) -> None:
    change(parts)
    with pytest.raises(BundleError, match=words):
        GraphTail(Bundle.open(parts.write(tmp_path / "b")), 1)


def test_a_bundle_of_weights_has_no_graphs(paper: Parts, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the manifest names no graphs"):
        GraphTail(Bundle.open(paper.write(tmp_path / "b")), 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("graphs"), "there must be either weights or graphs"),
        (lambda content: content.update(weights="image.onnx"), "there must be either weights or graphs"),
        (lambda content: content["graphs"].update(taps=["image.onnx"] * 2), "graphs must have one for each tap"),
        (lambda content: content["graphs"].update(image="missing.onnx"), "files does not list missing.onnx"),
        (lambda content: content["graphs"].update(image="../image.onnx"), "graphs.image"),
    ],
    ids=["neither", "both", "a tap too many", "not listed", "outside"],
)
def test_manifests_that_cannot_be_true_are_refused(
    parts: Parts, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    folder = parts.tamper(tmp_path / "b", change)
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert words in str(caught.value)
