"""The cloud's half of a split network whose code we do not have, run by ONNX Runtime; `tail.Tail` is for others."""

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
from isthmus.models.vision.manifest import Manifest
from isthmus.models.vision.outputs import Raw, graph_outputs
from isthmus.models.vision.tasks import AnyTask

Floats = NDArray[np.float32]
Inputs = Mapping[str, NDArray[Any]]


class GraphTail:
    """Computes answers of batches of latents and of whole images.

    The answer to a task that classifies is probabilities_BK; to others the graph's outputs for the batch, by name.
    """

    def __init__(self, bundle: Bundle, threads: int, device: torch.device = CPU) -> None:
        """`threads` for ONNX Runtime; 0 for every core. Without a CUDA provider it computes on the CPU.

        Raises BundleError when a graph does not fit the manifest.
        """
        cuda = device.index if device.type == "cuda" else None
        manifest = bundle.manifest
        if manifest.graphs is None:
            raise BundleError(f"{bundle.folder}: the manifest names no graphs")
        self._tasks, outputs = manifest.tasks, outputs_of(manifest)
        image = {"x": TensorSpec((None, 3, *manifest.preprocessing.crop))}
        self._image = open_graph(bundle, manifest.graphs.image, threads, image, outputs, cuda=cuda)
        self._taps = [
            open_graph(bundle, name, threads, latent_inputs(tap.latent), outputs, cuda=cuda)
            for name, tap in zip(manifest.graphs.taps, manifest.taps, strict=True)
        ]
        self.device = device if uses_cuda(self._image) else CPU

    def answer_latents(self, tap: int, latents: Sequence[Floats], rates: Sequence[int]) -> Floats:
        """Dequantised latents (C, H, W) of a tap with their rates -> probabilities_BK of the first task."""
        return probabilities(self.latents_to_tasks(tap, latents, rates, (0,))[0])

    def answer_images(self, images: Sequence[Floats]) -> Floats:
        """Preprocessed images (3, H, W) -> probabilities_BK of the first task, by the unsplit network."""
        return probabilities(self.images_to_tasks(images, (0,))[0])

    def latents_to_tasks(
        self, tap: int, latents: Sequence[Floats], rates: Sequence[int], tasks: Sequence[int]
    ) -> list[Floats | Raw]:
        """Dequantised latents (C, H, W) of a tap with their rates -> the answer to each of `tasks`."""
        return self._run(self._taps[tap], {"latent": np.stack(latents), "rate": np.array(rates, np.int64)}, tasks)

    def images_to_tasks(self, images: Sequence[Floats], tasks: Sequence[int]) -> list[Floats | Raw]:
        """Preprocessed images (3, H, W) -> the answer to each of `tasks`, by the unsplit network."""
        return self._run(self._image, {"x": np.stack(images)}, tasks)

    def _run(self, graph: Any, inputs: Inputs, tasks: Sequence[int]) -> list[Floats | Raw]:
        """Raises BundleError when the graph fails, Overloaded without memory, InvalidInput for tasks that are none."""
        if any(task >= len(self._tasks) for task in tasks):
            raise InvalidInput(f"tasks {list(tasks)} were requested, the network has {len(self._tasks)}")
        with translated("tail"):
            rest = iter(graph.run(None, inputs))
        found = [answer_of(task, {name: next(rest) for name in graph_outputs(task, None)}) for task in self._tasks]
        return [found[task] for task in tasks]


def answer_of(task: AnyTask, raw: Raw) -> Floats | Raw:
    """Probabilities where the task classifies, else the outputs as they are."""
    return softmax(raw["logits"]) if task.kind == "classify" else raw


def probabilities(answer: Floats | Raw) -> Floats:
    """An answer to a task that classifies. Raises BundleError for another."""
    if not isinstance(answer, np.ndarray):
        raise BundleError("the first task does not classify: it has no probabilities")
    return answer


def outputs_of(manifest: Manifest) -> Sequence[TensorSpec] | Mapping[str, TensorSpec]:
    """What the cloud's graphs give; the only output of a single classification has any name."""
    if len(manifest.tasks) == 1 and manifest.tasks[0].kind == "classify":
        return list(graph_outputs(manifest.tasks[0], None).values())
    return {f"{task.name}.{name}": spec for task in manifest.tasks for name, spec in graph_outputs(task, None).items()}


def latent_inputs(shape: Sequence[int]) -> dict[str, TensorSpec]:
    """What the graph of a tap takes."""
    return {"latent": TensorSpec((None, *shape)), "rate": TensorSpec((None,), INT64)}
