"""The device's half of a split classifier, run by ONNX Runtime. Knows nothing about policy, coding or the link."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.errors import BundleError

# ONNX Runtime reports to its makers unless told not to before it is loaded; its own switch comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

Floats = NDArray[np.float32]


class Head:
    """Segments of the trunk, each with an exit, and the encoder behind the last."""

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        """`threads` for ONNX Runtime; 0 lets it take every core. Raises BundleError when a file is not what it says."""
        manifest = bundle.manifest
        self.exits = len(manifest.segments)
        self._segments = [
            session(bundle, s.file, threads, [s.input], [s.output, (len(manifest.labels),)]) for s in manifest.segments
        ]
        bottleneck = manifest.bottleneck
        self._encoder = session(
            bundle, bottleneck.encoder, threads, [manifest.segments[-1].output], [bottleneck.latent]
        )

    def segment(self, index: int, x_CHW: Floats) -> tuple[Floats, Floats]:
        """Image (index 0) or features of the segment before -> features_CHW, probabilities_K of exit `index`."""
        features_1CHW, logits_1K = self._segments[index].run(None, {"x": x_CHW[None]})
        return features_1CHW[0], softmax(logits_1K[0])

    def encode(self, features_CHW: Floats) -> Floats:
        """Features of the last segment -> latent_CHW, not yet quantised."""
        latent_CHW: Floats = self._encoder.run(None, {"x": features_CHW[None]})[0][0]
        return latent_CHW


def softmax(logits_K: Floats) -> Floats:
    """Probabilities of one input."""
    weights_K = np.exp(logits_K - logits_K.max())
    probabilities_K: Floats = weights_K / weights_K.sum()
    return probabilities_K


def session(
    bundle: Bundle, name: str, threads: int, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]]
) -> onnxruntime.InferenceSession:
    """An ONNX graph of the bundle with exactly these shapes (batch of one left out). Raises BundleError."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not eat the battery
    options.log_severity_level = 3
    try:
        found = onnxruntime.InferenceSession(bundle.read(name), options, providers=["CPUExecutionProvider"])
    except BundleError:
        raise
    except Exception as error:  # onnxruntime's own classes share no public base
        raise BundleError(
            f"{bundle.folder / name}: not a usable ONNX graph: {str(error).splitlines()[0][:200]}"
        ) from error
    if [node.name for node in found.get_inputs()] != ["x"]:
        raise BundleError(f"{bundle.folder / name}: expected one input named x")
    for kind, nodes, shapes in (("input", found.get_inputs(), inputs), ("output", found.get_outputs(), outputs)):
        got = [tuple(node.shape) for node in nodes]
        if got != [(1, *shape) for shape in shapes]:
            raise BundleError(f"{bundle.folder / name}: {kind} shapes {got}, the manifest says {shapes}")
    return found
