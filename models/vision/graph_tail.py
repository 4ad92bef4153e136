"""The cloud's half of a split classifier whose code we do not have, run by ONNX Runtime; `tail.Tail` is for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.onnx_session import INT64, TensorSpec, translated, uses_cuda
from isthmus.models.torch_device import CPU
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.graphs import open_graph
from isthmus.models.vision.head import softmax

Floats = NDArray[np.float32]


class GraphTail:
    """Computes probabilities of batches of latents and of whole images."""

    def __init__(self, bundle: Bundle, threads: int, device: torch.device = CPU) -> None:
        """`threads` for ONNX Runtime; 0 for every core. Without a CUDA provider it computes on the CPU.

        Raises BundleError when a graph does not fit the manifest.
        """
        cuda = device.index if device.type == "cuda" else None
        manifest = bundle.manifest
        if manifest.graphs is None:
            raise BundleError(f"{bundle.folder}: the manifest names no graphs")
        logits = TensorSpec((None, len(manifest.tasks[0].labels)))
        image = {"x": TensorSpec((None, 3, *manifest.preprocessing.crop))}
        self._image = open_graph(bundle, manifest.graphs.image, threads, image, [logits], cuda=cuda)
        self._taps = [
            open_graph(bundle, name, threads, latent_inputs(tap.latent), [logits], cuda=cuda)
            for name, tap in zip(manifest.graphs.taps, manifest.taps, strict=True)
        ]
        self.device = device if uses_cuda(self._image) else CPU

    def answer_latents(self, tap: int, latents: Sequence[Floats], rates: Sequence[int]) -> Floats:
        """Dequantised latents (C, H, W) of a tap with their rates -> probabilities_BK."""
        inputs: dict[str, NDArray[Any]] = {"latent": np.stack(latents), "rate": np.array(rates, np.int64)}
        return softmax(run(self._taps[tap], inputs))

    def answer_images(self, images: Sequence[Floats]) -> Floats:
        """Preprocessed images (3, H, W) -> probabilities_BK, by the unsplit network."""
        return softmax(run(self._image, {"x": np.stack(images)}))

    def latents_to_tasks(
        self, tap: int, latents: Sequence[Floats], rates: Sequence[int], tasks: Sequence[int]
    ) -> list[Floats]:
        """Probabilities_BK for each of `tasks`, which can only be the first."""
        return [self.answer_latents(tap, latents, rates) for _ in the_only(tasks)]

    def images_to_tasks(self, images: Sequence[Floats], tasks: Sequence[int]) -> list[Floats]:
        """Probabilities_BK for each of `tasks`, which can only be the first."""
        return [self.answer_images(images) for _ in the_only(tasks)]


def latent_inputs(shape: Sequence[int]) -> dict[str, TensorSpec]:
    """What the graph of a tap takes."""
    return {"latent": TensorSpec((None, *shape)), "rate": TensorSpec((None,), INT64)}


def run(graph: Any, inputs: Mapping[str, NDArray[Any]]) -> Floats:
    """Logits. Raises BundleError when the graph fails, Overloaded when memory is exhausted."""
    with translated("tail"):
        logits_BK: Floats = graph.run(None, inputs)[0]
    return logits_BK


def the_only(tasks: Sequence[int]) -> Sequence[int]:
    """`tasks`, once checked. Raises InvalidInput when any but the first is requested."""
    if any(tasks):
        raise InvalidInput(f"tasks {list(tasks)} were requested, a network of graphs has task 0 only")
    return tasks
