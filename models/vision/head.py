"""The device's half of a split classifier, run by ONNX Runtime. Knows nothing about policy, coding or the link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.bundle.bundle import Bundle
from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.vision.graphs import open_graph
from isthmus.models.vision.manifest import Precision

Floats = NDArray[np.float32]


class Head:
    """Segments of the trunk, each with an exit, and the encoders of the taps."""

    def __init__(self, bundle: Bundle, threads: int = 0, precision: Precision = "fp32") -> None:
        """`threads` for ONNX Runtime; 0 lets it take every core.

        Raises BundleError when a file is not what it says, InvalidInput when the bundle lacks the precision.
        """
        manifest = bundle.manifest
        if precision not in manifest.heads:
            raise InvalidInput(f"precision {precision!r} is not in the bundle, there is {', '.join(manifest.heads)}")
        self.exits = len(manifest.segments)
        labels = (len(manifest.tasks[0].labels),)
        self._segments = [
            session(bundle, name, threads, {"x": segment.input}, [segment.output, labels])
            for name, segment in zip(manifest.heads[precision].files, manifest.segments, strict=True)
        ]
        self._widths = [len(tap.widths) for tap in manifest.taps]
        self._encoders = [self._encoder(bundle, index, threads) for index in range(len(manifest.taps))]

    def segment(self, index: int, x_CHW: Floats) -> tuple[Floats, Floats]:
        """Image (index 0) or features of the segment before -> features_CHW, probabilities_K of exit `index`."""
        features_1CHW, logits_1K = self._segments[index].run(None, {"x": x_CHW[None]})
        return features_1CHW[0], softmax(logits_1K[0])

    def encode(self, tap: int, x_CHW: Floats, width: int) -> Floats:
        """Image (a tap after 0 segments) or features behind as many as it comes after -> latent_CHW, not yet quantised.

        `width` indexes the tap's widths. Raises InvalidInput when there is no such width.
        """
        if not 0 <= width < self._widths[tap]:
            raise InvalidInput(f"width {width} does not exist, the tap has widths 0 to {self._widths[tap] - 1}")
        inputs: dict[str, NDArray[Any]] = {"x": x_CHW[None]}
        if self._widths[tap] > 1:
            inputs["width"] = np.array(width, np.int64)
        latent_CHW: Floats = self._encoders[tap].run(None, inputs)[0][0]
        return latent_CHW

    def _encoder(self, bundle: Bundle, index: int, threads: int) -> Any:
        manifest = bundle.manifest
        tap, after = manifest.taps[index], manifest.architecture.taps[index].after
        source = manifest.segments[after - 1].output if after else manifest.segments[0].input
        inputs: dict[str, tuple[int, ...] | None] = {"x": source}
        if self._widths[index] > 1:
            inputs["width"] = None
        return session(bundle, tap.encoder, threads, inputs, [tap.latent])


def softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities: Floats = weights / weights.sum(-1, keepdims=True)
    return probabilities


def session(
    bundle: Bundle,
    name: str,
    threads: int,
    inputs: Mapping[str, tuple[int, ...] | None],
    outputs: Sequence[tuple[int, ...]],
) -> Any:
    """An ONNX graph of the bundle with exactly these inputs and outputs. Raises BundleError.

    Shapes are of float32 arrays without their batch of one; None is one int64.
    """
    found = open_graph(bundle, name, threads)
    names = [node.name for node in found.get_inputs()]
    if names != list(inputs):
        raise BundleError(f"{bundle.folder / name}: inputs are named {names}, expected {list(inputs)}")
    sides = (("input", found.get_inputs(), list(inputs.values())), ("output", found.get_outputs(), list(outputs)))
    for kind, nodes, shapes in sides:
        got = [(node.type, tuple(node.shape)) for node in nodes]
        if got != [("tensor(int64)", ()) if s is None else ("tensor(float)", (1, *s)) for s in shapes]:
            raise BundleError(f"{bundle.folder / name}: {kind} shapes {got}, the manifest says {shapes}")
    return found
