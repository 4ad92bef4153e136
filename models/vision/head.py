"""The device's half of a split network, run by ONNX Runtime. Knows nothing about policy, coding or the link."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import InvalidInput
from isthmus.models.onnx_session import INT64, TensorSpec, translated
from isthmus.models.vision.architecture import Shape
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.graphs import open_graph
from isthmus.models.vision.manifest import Precision
from isthmus.models.vision.outputs import ExitOutput, graph_outputs

Floats = NDArray[np.float32]


class Head:
    """Segments of the trunk, each with an exit, and the encoders of the taps."""

    def __init__(self, bundle: Bundle, threads: int = 0, precision: Precision = "fp32") -> None:
        """`threads` for ONNX Runtime; 0 for every core.

        Raises BundleError when a graph does not fit the manifest, InvalidInput when the bundle lacks the precision.
        """
        manifest = bundle.manifest
        if precision not in manifest.heads:
            raise InvalidInput(f"precision {precision!r} is not in the bundle, there is {', '.join(manifest.heads)}")
        self.exits = len(manifest.segments)
        described, task = manifest.heads[precision], manifest.tasks[0]
        self._classifies, self._outputs = task.kind == "classify", graph_outputs(task, 1)
        self._segments = [
            open_graph(
                bundle, name, threads, {"x": one(segment.input)}, [one(segment.output), *self._specs(exit_.answers)]
            )
            for name, segment, exit_ in zip(described.files, manifest.segments, described.exits, strict=True)
        ]
        self._widths = [len(tap.widths) for tap in manifest.taps]
        self._encoders = [self._encoder(bundle, index, threads) for index in range(len(manifest.taps))]

    def segment(self, index: int, x_CHW: Floats) -> tuple[Floats, ExitOutput]:
        """Image (index 0) or features of the segment before -> features_CHW, what exit `index` gives.

        Raises BundleError when the graph fails, Overloaded when memory is exhausted; `encode` too.
        """
        with translated(f"segment {index} of the head"):
            features_1CHW, *outputs = self._segments[index].run(None, {"x": x_CHW[None]})
        if not outputs:
            return features_1CHW[0], None
        if self._classifies:
            return features_1CHW[0], softmax(outputs[0][0])
        return features_1CHW[0], {name: batch[0] for name, batch in zip(self._outputs, outputs, strict=True)}

    def run(self, image_CHW: Floats) -> tuple[list[Floats], list[Floats]]:
        """All segments: the image and the features after each of them; the probabilities of each exit.

        Exits that give none are left out.
        """
        inputs, exits_K = [image_CHW], list[Floats]()
        for index in range(self.exits):
            features_CHW, output = self.segment(index, inputs[-1])
            inputs.append(features_CHW)
            if isinstance(output, np.ndarray):
                exits_K.append(output)
        return inputs, exits_K

    def encode(self, tap: int, x_CHW: Floats, width: int) -> Floats:
        """Input of a tap -> latent_CHW, not quantised. The input is the image, or the features after the tap's segment.

        `width` indexes the tap's widths. Raises InvalidInput when there is no such width.
        """
        if not 0 <= width < self._widths[tap]:
            raise InvalidInput(f"width {width} does not exist, the tap has widths 0 to {self._widths[tap] - 1}")
        inputs: dict[str, NDArray[Any]] = {"x": x_CHW[None]}
        if self._widths[tap] > 1:
            inputs["width"] = np.array(width, np.int64)
        with translated(f"encoder of tap {tap}"):
            latent_CHW: Floats = self._encoders[tap].run(None, inputs)[0][0]
        return latent_CHW

    def _specs(self, answers: bool) -> list[TensorSpec]:
        return list(self._outputs.values()) if answers else []

    def _encoder(self, bundle: Bundle, index: int, threads: int) -> Any:
        manifest = bundle.manifest
        tap, after = manifest.taps[index], manifest.architecture.taps[index].after
        source = manifest.segments[after - 1].output if after else manifest.segments[0].input
        inputs = {"x": one(source)}
        if self._widths[index] > 1:
            inputs["width"] = TensorSpec((), INT64)
        return open_graph(bundle, tap.encoder, threads, inputs, [one(tap.latent)])


def one(shape: Shape) -> TensorSpec:
    """A batch of one float32 array."""
    return TensorSpec((1, *shape))


def softmax(logits: Floats) -> Floats:
    """Softmax over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities: Floats = weights / weights.sum(-1, keepdims=True)
    return probabilities
