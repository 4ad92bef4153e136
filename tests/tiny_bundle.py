"""A real vision bundle, small and untrained: two taps (one of them with two widths of its encoder), two tasks.

Random weights; figures in its manifest are made up. This is no recipe: the graphs are exported as plainly as can be.
"""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper
from torch import Tensor, nn

from models import bundle as bundles
from models.bundle import Bundle
from models.codecs import contextual
from models.codecs.contextual import Tables
from models.manifest import Architecture, Preprocessing, TapArchitecture
from models.recipes.fit_tables import fit
from models.vision.slim import FrozenSlim
from models.vision.split import SplitClassifier

SIDE = 64
TASKS = (("defect", ("good", "bad")), ("colour", ("red", "green", "blue")))
TAPS = ("light", "deep")
TINY = Architecture(
    builder="split_classifier",
    backbone="efficientnet_lite0",
    classes=(2, 3),
    cuts=(2, 6),
    taps=(
        TapArchitecture(
            after=0, blocks=4, rejoin=5, latent_channels=3, decoder_channels=16, rates=3, widths=(0.5, 1.0)
        ),
        TapArchitecture(after=2, latent_channels=4, decoder_channels=16, rates=2),
    ),
)
PREPROCESSING = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5))
GAINS = (1.0, 3.0, 6.0)  # of the rates of a tap
CAP = 4096  # bytes of a payload
OPSET = 17

Floats = NDArray[np.float32]


def random_images(count: int, seed: int) -> list[Floats]:
    """Smooth random images (3, SIDE, SIDE) as the preprocessing gives them."""
    coarse = np.random.default_rng(seed).uniform(-1, 1, (count, 3, SIDE // 8, SIDE // 8)).astype(np.float32)
    return [image_CHW.repeat(8, axis=1).repeat(8, axis=2) for image_CHW in coarse]


def laplace_tables(channels: int, gains: tuple[float, ...]) -> Tables:
    """Tables fitted to rounded Laplace noise, a few integers wide."""
    rng = np.random.default_rng(0)
    integers = [np.rint(rng.laplace(0, 1.5, (64, channels, 8, 8))).clip(-20, 20) for _ in gains]
    gains_RC = np.repeat(np.array(gains, np.float32)[:, None], channels, axis=1)
    return fit([rate_NCHW.astype(np.int32) for rate_NCHW in integers], gains_RC)


def random_split() -> SplitClassifier:
    """EfficientNet-Lite0 with seeded random weights and batch-norm statistics of random images, in eval mode."""
    torch.manual_seed(0)
    split = SplitClassifier(TINY)
    for norm in (module for module in split.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    for matrix in (parameter for parameter in split.parameters() if parameter.ndim > 1 and not parameter.any()):
        nn.init.normal_(matrix, std=0.2)  # training starts from rates that are all alike
    with torch.no_grad():
        images_B3HW = torch.rand(8, 3, SIDE, SIDE) * 2 - 1
        early_BCHW = split.train().segment(0, images_B3HW)
        late_BCHW = split.segment(1, early_BCHW)
        split.exits[0](early_BCHW)
        split.exits[1](late_BCHW)
        for width in range(2):
            light_BCHW = split.taps[0].encoder(images_B3HW, width)
        for tap, latent_BCHW in enumerate((light_BCHW, split.taps[1].encoder(late_BCHW))):
            split.tail(split.decode(tap, latent_BCHW, torch.arange(8) % 2))
        for task in range(len(TASKS)):
            split.answer(late_BCHW, task)
    return split.eval()


class WithExit(nn.Module):
    """A segment as the device runs it: features and logits of its exit."""

    def __init__(self, blocks: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = blocks, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features_BCHW = self.blocks(x)
        return features_BCHW, self.head(features_BCHW)


class AtWidth(nn.Module):
    """One width of a slimmable encoder."""

    def __init__(self, encoder: FrozenSlim, width: int) -> None:
        super().__init__()
        self.encoder, self.width = encoder, width

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, self.width)


def graph_of(module: nn.Module, shape_CHW: tuple[int, ...], outputs: int = 1) -> onnx.ModelProto:
    """A module as an ONNX graph with input `x` of batch 1."""
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (torch.zeros(1, *shape_CHW),),
            buffer,  # type: ignore[arg-type]
            input_names=["x"],
            output_names=[f"y{index}" for index in range(outputs)],
            opset_version=OPSET,
            dynamo=False,
        )
    return onnx.load_from_string(buffer.getvalue())


def chosen_by_width(graphs: list[onnx.GraphProto]) -> bytes:
    """Two graphs of `x`, one a width -> one graph of `x` and `width`."""
    branches = []
    for index, graph in enumerate(graphs):
        branch = compose.add_prefix_graph(graph, f"w{index}_", rename_inputs=False)
        del branch.input[:]  # `x` is the outer graph's
        branches.append(branch)
    narrow, wide = branches
    nodes = [
        helper.make_node("Constant", [], ["zero"], value_int=0),
        helper.make_node("Equal", ["width", "zero"], ["narrow"]),
        helper.make_node("If", ["narrow"], ["latent"], then_branch=narrow, else_branch=wide),
    ]
    width = helper.make_tensor_value_info("width", TensorProto.INT64, [])
    latent = onnx.ValueInfoProto()
    latent.CopyFrom(graphs[0].output[0])
    latent.name = "latent"
    graph = helper.make_graph(nodes, "encoder", [graphs[0].input[0], width], [latent])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def write_tiny_bundle(folder: Path, split: SplitClassifier) -> Bundle:
    """2 + 3 labels, 64x64 photos, 2 exits; latents (3, 8, 8) of the image and (4, 8, 8) behind the last segment."""
    split = copy.deepcopy(split)
    with torch.no_grad():
        for tensor in split.state_dict().values():
            if tensor.ndim >= 2:
                tensor.copy_(tensor.half().float())
    stored = {n: (t.half() if t.ndim >= 2 else t).contiguous().clone() for n, t in split.state_dict().items()}
    segments, files = segments_of(split)
    files["weights.safetensors"] = safetensors.torch.save(stored)
    frozen = FrozenSlim(split.taps[0].encoder)  # type: ignore[arg-type]
    graphs = [graph_of(AtWidth(frozen, width), (3, SIDE, SIDE)).graph for width in range(2)]
    files["light.onnx"] = chosen_by_width(graphs)
    files["deep.onnx"] = graph_of(split.taps[1].encoder, segments[-1]["output"]).SerializeToString()
    for name, built in zip(TAPS, TINY.taps, strict=True):
        tables = laplace_tables(built.latent_channels, GAINS[: built.rates])
        files[f"{name}.safetensors"] = safetensors.numpy.save(contextual.to_tensors(tables))
    return bundles.write(folder, manifest_of(segments), files)


def segments_of(split: SplitClassifier) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Manifest entries of the segments, and their graphs."""
    segments, files, x_BCHW = [], {}, torch.zeros(1, 3, SIDE, SIDE)
    for index, (start, stop) in enumerate(itertools.pairwise((0, *TINY.cuts))):
        part = WithExit(split.backbone.blocks[start:stop], split.exits[index])
        files[f"head{index}.onnx"] = graph_of(part, tuple(x_BCHW.shape[1:]), outputs=2).SerializeToString()
        with torch.no_grad():
            y_BCHW = split.segment(index, x_BCHW)
        shapes = {"input": list(x_BCHW.shape[1:]), "output": list(y_BCHW.shape[1:])}
        segments.append({"file": f"head{index}.onnx", **shapes, "macs": 10_000_000})
        x_BCHW = y_BCHW
    return segments, files


def manifest_of(segments: list[dict[str, Any]]) -> dict[str, Any]:
    """What `models.bundle.write` wants to know. The wider and the richer, the more agreement and the more bytes."""
    taps = []
    for name, built in zip(TAPS, TINY.taps, strict=True):
        widths = [
            {"width": width, "encoder_macs": int(8_000_000 * width), "rates": rates_of(built.rates, width)}
            for width in built.widths
        ]
        files = {"encoder": f"{name}.onnx", "tables": f"{name}.safetensors"}
        latent = [built.latent_channels, 8, 8]
        sizes = {"latent": latent, "tail_macs": 30_000_000, "max_payload_bytes": CAP}
        taps.append({"name": name, **files, **sizes, "widths": widths})
    threshold = {"delta": 0.1, "coverage": 0.5, "loss": 0.0, "samples": 300}
    return {
        "name": "tiny",
        "licence": "none: random weights",
        "tasks": [{"name": name, "labels": list(labels)} for name, labels in TASKS],
        "preprocessing": PREPROCESSING.model_dump(mode="json"),
        "architecture": TINY.model_dump(mode="json"),
        "weights": "weights.safetensors",
        "segments": segments,
        "exits": [{"name": f"exit{index}", "accuracy": 0.7, "agreement": 0.8} for index in range(len(segments))],
        "taps": taps,
        "tail_macs": 20_000_000,
        "thresholds": [{"epsilon": e, "confidence": c, **threshold} for e, c in ((0.005, 0.99), (0.02, 0.97))],
        "training": {
            "command": "tests/tiny_bundle.py",
            "seed": 0,
            "seconds": 0.0,
            "data": "none",
            "machine": "any",
            "versions": {},
        },
        "units": {},
        "scores": {"test cloud accuracy": {"value": 0.75, "low": 0.5, "high": 0.9, "samples": 20}},
    }


def rates_of(count: int, width: float) -> list[dict[str, Any]]:
    return [
        {
            "mean_bytes": 40.0 + 40 * rate,
            "max_bytes": 200,
            "accuracy": 0.8,
            "agreement": round(0.93 + 0.02 * width + 0.01 * rate, 3),
        }
        for rate in range(count)
    ]
