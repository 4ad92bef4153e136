"""A trained split classifier -> the files of a bundle and their manifest entries, without measured figures."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.models.codecs import checkerboard as contextual
from isthmus.models.codecs.checkerboard import Tables
from isthmus.models.recipes.vision.graphs import compact, onnx_bytes
from isthmus.models.recipes.vision.int8 import quantise_head
from isthmus.models.recipes.vision.slim_onnx import slim_onnx
from isthmus.models.vision.architecture import Architecture
from isthmus.models.vision.catalog import BUILDERS
from isthmus.models.vision.manifest import Precision, Preprocessing
from isthmus.models.vision.slim import SlimEncoder
from isthmus.models.vision.split import SplitClassifier, Tap
from isthmus.models.vision.tail import in_channels
from isthmus.models.vision.tasks import Task

Floats = NDArray[np.float32]

LEAST_SCALE = 1e-12  # of a channel of zeros
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class TrainedTap:
    """The integer tables of one tap, and the cap of its payloads in bytes."""

    name: str
    tables: Tables
    max_payload_bytes: int


@dataclass(frozen=True)
class Trained:
    """The result of a recipe. `ranges`: preprocessed training images for the scales of an int8 head."""

    split: SplitClassifier
    taps: tuple[TrainedTap, ...]
    tasks: tuple[Task, ...]
    architecture: Architecture
    preprocessing: Preprocessing
    ranges: Sequence[Floats]


class WithExit(nn.Module):
    """One segment as an ONNX graph: features and exit logits."""

    def __init__(self, blocks: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = blocks, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features_BCHW = self.blocks(x)
        return features_BCHW, self.head(features_BCHW)


@torch.no_grad()
def halve(module: nn.Module, coarse: Container[str] = ()) -> dict[str, Tensor]:
    """Round matrices to float16 in place and return the tensors to store; vectors stay float32.

    Matrices named in `coarse` are rounded to 8 bits, with a scale for each output channel.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if tensor.ndim >= 2 and name in coarse:
            scale_O = tensor.abs().flatten(1).amax(1).clamp(min=LEAST_SCALE) / 127
            codes = torch.round(tensor / in_channels(scale_O, tensor.ndim)).to(torch.int8)
            stored |= {name: codes.contiguous(), f"{name}.scale": scale_O}
            tensor.copy_(codes.float() * in_channels(scale_O, tensor.ndim))
            continue
        if tensor.ndim >= 2:
            tensor.copy_(tensor.half().float())
        stored[name] = (tensor.half() if tensor.ndim >= 2 else tensor).contiguous().clone()
    return stored


def in_cloud(split: SplitClassifier, architecture: Architecture) -> set[str]:
    """Tensors that only the cloud uses: of taps' tails, and after the last cut unless exits use these blocks."""
    cut = 1 << 30 if architecture.exit_blocks else architecture.cuts[-1]
    found = set()
    for name in split.state_dict():
        parts = name.split(".")
        if parts[:2] == ["backbone", "blocks"] and int(parts[2]) >= cut:
            found.add(name)
        if parts[0] == "taps" and parts[2] in ("tail", "between", "decoder"):
            found.add(name)
    return found


class FromLatent(nn.Module):
    """The cloud's part from a tap's latent to logits of the first task."""

    def __init__(self, split: SplitClassifier, tap: int) -> None:
        super().__init__()
        self.split, self.tap = split, tap

    def forward(self, latent: Tensor, rate: Tensor) -> Tensor:
        return self.split.answer(self.split.decode(self.tap, latent, rate), 0, self.tap)


def macs(module: nn.Module, *inputs: Tensor | int) -> int:
    """Multiply-accumulate operations of one call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class Parts:
    """Manifest entries of segments and taps, the graphs of the segments at each precision, and all files."""

    segments: list[dict[str, Any]]
    taps: list[dict[str, Any]]
    heads: dict[Precision, list[str]]
    files: dict[str, bytes]


def head_parts(trained: Trained) -> Parts:
    """The device's part: segments with exits at each precision, and the encoders and tables of taps."""
    split, segments = trained.split, []
    graphs: list[bytes] = []
    shapes: list[Shape] = [(3, *trained.preprocessing.crop)]
    starts = (0, *trained.architecture.cuts)
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        x_BCHW = torch.zeros(1, *shapes[-1])
        part = WithExit(split.backbone.section(start, stop), split.exit(index))
        graphs.append(onnx_bytes(part, {"x": x_BCHW}, outputs=2))
        with torch.no_grad():
            y_BCHW = split.segment(index, x_BCHW)
        shapes.append(chw(y_BCHW))
        segments.append({"input": shapes[-2], "output": shapes[-1], "macs": macs(part, x_BCHW)})
    heads: dict[Precision, list[str]] = {}
    files: dict[str, bytes] = {}
    at_precision: dict[Precision, list[bytes]] = {"fp32": graphs, "int8": quantise_head(graphs, trained.ranges)}
    for precision, own_graphs in at_precision.items():
        named = {f"head{index}.{precision}.onnx": compact(graph) for index, graph in enumerate(own_graphs)}
        heads[precision] = list(named)
        files |= named
    taps = []
    for index, (described, built) in enumerate(zip(trained.taps, trained.architecture.taps, strict=True)):
        entry, own_files = tap_parts(split, split.tap(index), described, shapes[built.after])
        taps.append(entry)
        files |= own_files
    return Parts(segments, taps, heads, files)


def cloud_parts(trained: Trained) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The cloud's part, manifest entry and files: weights, or graphs for a network without a builder."""
    split = trained.split
    if trained.architecture.builder in BUILDERS:
        stored = halve(split, in_cloud(split, trained.architecture))
        return {"weights": "weights.safetensors"}, {"weights.safetensors": safetensors.torch.save(stored)}
    images_B3HW = torch.zeros(2, 3, *trained.preprocessing.crop)
    halve(nn.ModuleList([split.taps, split.exits]))  # not the backbone, whose weights are the user's
    files = {"image.onnx": compact(onnx_bytes(split.backbone, {"x": images_B3HW}, outputs=1))}
    with torch.no_grad():
        features_BCHW = split.trunk(images_B3HW)
        for index, described in enumerate(trained.taps):
            inputs = {"latent": split.tap(index).encoder(features_BCHW), "rate": torch.zeros(2, dtype=torch.long)}
            files[f"{described.name}_tail.onnx"] = compact(onnx_bytes(FromLatent(split, index), inputs, outputs=1))
    image, *taps = files
    return {"graphs": {"image": image, "taps": taps}}, files


def tap_parts(
    split: SplitClassifier, tap: Tap, described: TrainedTap, input_CHW: Shape
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest entry of a tap without its measured rates, and its two files."""
    x_BCHW, rate_B = torch.zeros(1, *input_CHW), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        latent_BCHW = tap.encoder(x_BCHW)
        decoded_BCHW = tap.decoder(latent_BCHW, rate_B)
    latent_CHW = chw(latent_BCHW)
    if isinstance(tap.encoder, SlimEncoder):
        graph = slim_onnx(tap.encoder, input_CHW, latent_CHW)
        costs = [(width, macs(tap.encoder, x_BCHW, index)) for index, width in enumerate(tap.encoder.widths)]
    else:
        graph = onnx_bytes(tap.encoder, {"x": x_BCHW}, outputs=1)
        costs = [(1.0, macs(tap.encoder, x_BCHW))]
    rest = split.backbone.section(tap.rejoin)
    files = (f"{described.name}.onnx", f"{described.name}.safetensors")
    entry: dict[str, Any] = {
        "name": described.name,
        "encoder": files[0],
        "tables": files[1],
        "latent": latent_CHW,
        "tail_macs": macs(tap.decoder, latent_BCHW, rate_B) + macs(rest, decoded_BCHW),
        "max_payload_bytes": described.max_payload_bytes,
        "widths": [{"width": width, "encoder_macs": cost} for width, cost in costs],
    }
    tables = {key: torch.from_numpy(value) for key, value in contextual.to_tensors(described.tables).items()}
    return entry, {files[0]: graph, files[1]: safetensors.torch.save(tables)}


def chw(features_BCHW: Tensor) -> Shape:
    """Channels, height, width."""
    _, channels, height, width = features_BCHW.shape
    return channels, height, width
