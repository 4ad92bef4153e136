"""A real detector bundle, small and untrained: graphs made node by node, in a second and without PyTorch.

The network takes 32x32 photos. Its candidates lie on a grid of 4x4 cells; a cell's scores are logistic functions of its
mean colour: `red` where it is red, `green` where it is green. The bottleneck sends the mean colours; so whole images
and every split give the same boxes, which a test can say beforehand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from isthmus.models.bundle.files import write_bundle
from isthmus.models.codecs.checkerboard import to_tensors
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.certificates import dependencies
from isthmus.models.vision.manifest import NEVER, Manifest
from tests.tiny_bundle import depends_on, laplace_tables

SIDE, CELLS = 32, 4
LABELS = ("red", "green")
TASK = {
    "kind": "detect", "name": "things", "labels": list(LABELS), "max_boxes": 20, "min_score": 0.6, "nms_iou": 0.5,
}  # fmt: skip
STEEP = 8.0  # of the logistic functions
GAIN = 20.0  # of the latent: its integers say colours within 2.5 %
NUMBER = onnx.TensorProto.FLOAT

Arrays = dict[str, NDArray[Any]]


def grid() -> NDArray[np.float32]:
    """The cells' corners (1, N, 4) in pixels of the input, row by row."""
    cell = SIDE // CELLS
    ticks = np.arange(CELLS, dtype=np.float32) * cell
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    return np.stack([x, y, x + cell, y + cell], 2).reshape(1, -1, 4)


def graph(
    nodes: list[Any], arrays: Arrays, inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, list[Any]]
) -> bytes:
    """An ONNX graph of `nodes` over constants."""
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, NUMBER, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    serialised: bytes = model.SerializeToString()
    return serialised


def pool(source: str, target: str) -> Any:
    """Mean colours of the cells."""
    side = SIDE // CELLS
    return helper.make_node("AveragePool", [source], [target], kernel_shape=[side, side], strides=[side, side])


def detect(source: str, prefix: str) -> list[Any]:
    """Mean colours (B, 3, CELLS, CELLS), in [-1, 1] -> candidates, for any batch."""
    return [
        helper.make_node("Conv", [source, "kernel"], ["logits4"]),
        helper.make_node("Reshape", ["logits4", "rows"], ["logits"]),
        helper.make_node("Transpose", ["logits"], ["logits_NC"], perm=[0, 2, 1]),
        helper.make_node("Sigmoid", ["logits_NC"], [f"{prefix}scores"]),
        helper.make_node("ReduceMean", ["logits_NC"], ["mean"], axes=[2], keepdims=1),
        helper.make_node("Mul", ["mean", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "grid"], [f"{prefix}boxes"]),
    ]


def constants() -> Arrays:
    """`red` is red less green and blue."""
    kernel = STEEP * np.array([[1, -1, -1], [-1, 1, -1]], np.float32).reshape(2, 3, 1, 1) / 2
    return {"kernel": kernel, "rows": np.array([0, 2, -1], np.int64), "zero": np.zeros(1, np.float32), "grid": grid()}


def outputs(batch: Any, prefix: str = "things.") -> dict[str, list[Any]]:
    count = CELLS * CELLS
    return {f"{prefix}boxes": [batch, count, 4], f"{prefix}scores": [batch, count, len(LABELS)]}


def graphs(exits: bool) -> dict[str, bytes]:
    """Files of the bundle. `exits`: the device's segment also detects."""
    latent = [3, CELLS, CELLS]
    photo, colours = {"x": (NUMBER, ["batch", 3, SIDE, SIDE])}, ["batch", *latent]
    sent = {"latent": (NUMBER, colours), "rate": (TensorProto.INT64, ["batch"])}
    used = [
        helper.make_node("Cast", ["rate"], ["number"], to=NUMBER),
        helper.make_node("Mul", ["number", "zero"], ["nought"]),
        helper.make_node("Reshape", ["nought", "column"], ["nought4"]),
        helper.make_node("Add", ["latent", "nought4"], ["rated"]),
    ]
    more: Arrays = {"column": np.array([-1, 1, 1, 1], np.int64)}
    head_outputs = {"features": [1, *latent], **(outputs(1, "exit_") if exits else {})}
    one = {"x": (NUMBER, [1, 3, SIDE, SIDE])}
    whole = [pool("x", "means"), *detect("means", "things.")]
    head = [pool("x", "features"), *(detect("features", "exit_") if exits else [])]
    return {
        "image.onnx": graph(whole, constants(), photo, outputs("batch")),
        "tail.onnx": graph([*used, *detect("rated", "things.")], {**constants(), **more}, sent, outputs("batch")),
        "head.onnx": graph(head, constants() if exits else {}, one, head_outputs),
        "encoder.onnx": graph(
            [helper.make_node("Identity", ["x"], ["latent"])],
            {},
            {"x": (NUMBER, [1, *latent])},
            {"latent": [1, *latent]},
        ),
    }


def content(exits: bool, fit: str) -> dict[str, Any]:
    """A manifest for `write_bundle`; its figures are made up."""
    threshold = {
        "promise": "agreement", "among": "all", "epsilon": 0.005, "delta": 0.1, "confidences": [NEVER], "shares": [0.0],
        "accuracy": 0.0, "agreement": 0.0, "loss": 0.0, "samples": 300,
    }  # fmt: skip
    rate = {"mean_bytes": 60.0, "max_bytes": 400, "accuracy": 0.9, "agreement": 0.95}
    way = {"form": "png", "quality": 100, "mean_bytes": 3000.0, "accuracy": 1.0, "agreement": 1.0}
    return {
        "name": "tiny-detector",
        "licence": "none: no weights",
        "tasks": [TASK],
        "preprocessing": {
            "resize": SIDE, "crop": [SIDE, SIDE], "mean": [0.5] * 3, "deviation": [0.5] * 3, "fit": fit,
        },
        "architecture": {
            "builder": "graphs", "backbone": "tiny", "classes": [len(LABELS)], "cuts": [1],
            "taps": [{"after": 1, "latent_channels": 3, "decoder_channels": 1, "rates": 1}],
        },
        "graphs": {"image": "image.onnx", "taps": ["tail.onnx"]},
        "segments": [{"input": [3, SIDE, SIDE], "output": [3, CELLS, CELLS], "macs": 3072}],
        "heads": {
            "fp32": {
                "files": ["head.onnx"],
                "exits": [{"name": "exit0", "accuracy": 0.0, "agreement": 0.0, "answers": exits}],
                "thresholds": [threshold],
                "depends_on": depends_on("fp32"),
            }
        },
        "taps": [
            {
                "name": "colours", "encoder": "encoder.onnx", "tables": "tables.safetensors",
                "latent": [3, CELLS, CELLS], "tail_macs": 96, "max_payload_bytes": 1024,
                "widths": [{"width": 1.0, "encoder_macs": 0, "rates": [rate]}],
            }
        ],
        "images": [way],
        "calibration_samples": 300,
        "tail_macs": 96,
        "training": {
            "command": "tests/tiny_detector.py", "seed": 0, "seconds": 0.0, "data": "none", "machine": "any",
            "versions": {},
        },
        "units": {},
        "scores": {},
    }  # fmt: skip


def write_tiny_detector(folder: Path, *, exits: bool = False, fit: str = "letterbox", **changes: Any) -> Bundle:
    """`changes` of the manifest's fields."""
    tables = save(to_tensors(laplace_tables(3, (GAIN,))))
    files = {**graphs(exits), "tables.safetensors": tables}
    about = {**content(exits, fit), **changes}
    draft = Bundle.open(write_bundle(folder, about, files, Manifest)).manifest
    about["heads"]["fp32"]["depends_on"] = dependencies(draft, "fp32").model_dump()
    return Bundle.open(write_bundle(folder, about, files, Manifest))
