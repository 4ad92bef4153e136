"""The cloud's half of a split classifier, run by PyTorch. Knows nothing about queues or the wire."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from isthmus.models.errors import BundleError
from isthmus.models.torch_device import CPU, download, upload
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.catalog import BUILDERS
from isthmus.models.vision.efficientnet_lite import fuse_batch_norms
from isthmus.models.vision.graph_tail import GraphTail
from isthmus.models.vision.split import SplitClassifier

Floats = NDArray[np.float32]

FIRST = (0,)  # the first task only


class Tail:
    """Computes probabilities of batches of latents and of whole images, for any of the bundle's tasks."""

    def __init__(self, bundle: Bundle, device: torch.device = CPU) -> None:
        """Build the architecture and load its weights. Raises BundleError when they do not fit."""
        self.device = device
        fused = fuse_batch_norms(load_split(bundle)).to(device)
        self._split = fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def answer_latents(self, tap: int, latents: Sequence[Floats], rates: Sequence[int]) -> Floats:
        """Dequantised latents (C, H, W) of a tap with their rates -> probabilities_BK of the first task."""
        return self.latents_to_tasks(tap, latents, rates, FIRST)[0]

    def answer_images(self, images: Sequence[Floats]) -> Floats:
        """Preprocessed images (3, H, W) -> probabilities_BK of the first task, by the unsplit cloud model."""
        return self.images_to_tasks(images, FIRST)[0]

    @torch.inference_mode()
    def latents_to_tasks(
        self, tap: int, latents: Sequence[Floats], rates: Sequence[int], tasks: Sequence[int]
    ) -> list[Floats]:
        """Dequantised latents (C, H, W) of a tap with their rates -> probabilities_BK of each of `tasks`."""
        rates_B = upload(torch.tensor(list(rates)), self.device)
        return self._answers(self._split.decode(tap, self._batch(latents), rates_B), tasks, tap)

    @torch.inference_mode()
    def images_to_tasks(self, images: Sequence[Floats], tasks: Sequence[int]) -> list[Floats]:
        """Preprocessed images (3, H, W) -> probabilities_BK of each of `tasks`, by the unsplit cloud model."""
        return self._answers(self._split.trunk(self._batch(images)), tasks)

    def _batch(self, arrays: Sequence[Floats]) -> Tensor:
        batch_BCHW = upload(torch.from_numpy(np.stack(arrays)), self.device)
        return batch_BCHW.to(memory_format=torch.channels_last)

    def _answers(self, features_BCHW: Tensor, tasks: Sequence[int], tap: int | None = None) -> list[Floats]:
        return [probabilities(self._split.answer(features_BCHW, task, tap)) for task in tasks]


def open_tail(bundle: Bundle, device: torch.device = CPU) -> Tail | GraphTail:
    """The cloud's half of any bundle, on PyTorch's number of threads. Raises BundleError when it does not fit."""
    return GraphTail(bundle, torch.get_num_threads(), device) if bundle.manifest.graphs else Tail(bundle, device)


def load_split(bundle: Bundle) -> SplitClassifier:
    """The bundle's network with its weights in float32, in eval mode. Raises BundleError."""
    architecture, weights = bundle.manifest.architecture, bundle.manifest.weights
    if weights is None:
        raise BundleError(f"{bundle.folder}: the manifest names no weights")
    builder = BUILDERS.get(architecture.builder)
    if builder is None:
        raise BundleError(f"{bundle.folder}: no builder {architecture.builder!r}, there are {', '.join(BUILDERS)}")
    stored = widened({name: torch.from_numpy(array) for name, array in bundle.tensors(weights).items()})
    try:
        with torch.device("meta"):
            split = builder(architecture)
        expected = split.state_dict()
        for name in sorted(expected.keys() ^ stored.keys()):
            raise BundleError(f"{bundle.folder}: weights {'lack' if name in expected else 'have unknown'} {name}")
        for name, tensor in stored.items():
            if tensor.shape != expected[name].shape:
                shapes = f"{tuple(tensor.shape)}, the architecture says {tuple(expected[name].shape)}"
                raise BundleError(f"{bundle.folder}: weight {name} has shape {shapes}")
            stored[name] = tensor.to(expected[name].dtype)
        split.load_state_dict(stored, assign=True)
    except (KeyError, IndexError, RuntimeError) as error:
        raise BundleError(f"{bundle.folder}: the architecture cannot be built: {error}") from error
    return split.eval().requires_grad_(False)


def in_channels(scale_O: Tensor, axes: int) -> Tensor:
    """A scale of each output channel, reshaped to broadcast over a weight with `axes` dimensions."""
    return scale_O.view(-1, *[1] * (axes - 1))


def widened(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored weights as the network takes them: 8-bit ones are multiplied with their scales. Raises BundleError."""
    found = {name: tensor for name, tensor in stored.items() if tensor.dtype != torch.int8}
    for name, codes in stored.items():
        if codes.dtype == torch.int8:
            scale_O = found.pop(f"{name}.scale", None)
            if scale_O is None or codes.ndim < 2 or scale_O.shape != codes.shape[:1]:
                raise BundleError(f"weight {name} is in 8 bits and lacks a scale for each of its channels")
            found[name] = codes.float() * in_channels(scale_O.float(), codes.ndim)
    return found


def probabilities(logits_BK: Tensor) -> Floats:
    """Softmax as float32 NumPy."""
    return download(F.softmax(logits_BK.float(), dim=1))
