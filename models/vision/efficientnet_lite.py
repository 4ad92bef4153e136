"""EfficientNet-Lite as a flat list of blocks, so that it can be cut anywhere.

Knows nothing about bundles, bottlenecks or where a block runs: `head` is `net.blocks[:k]`, `tail` the rest.

    x_BCHW -> stem -> blocks[0] ... blocks[n-1] -> head_conv -> mean over H, W -> classifier -> logits_BK

Source: Tan & Le, "EfficientNet" (ICML 2019), section 4; the Lite variants drop squeeze-and-excitation, use ReLU6
and keep stem and last stage at their Lite0 width. Padding is TensorFlow's SAME, because the ImageNet weights expect it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from isthmus.models.vision.blocks import Blocks


@dataclass(frozen=True)
class Stage:
    """One row of table 1 of the paper at width and depth 1."""

    channels: int
    blocks: int
    stride: int
    kernel: int
    expansion: int


STEM_CHANNELS = 32
FEATURE_CHANNELS = 1280
STAGES = (
    Stage(16, 1, 1, 3, 1),
    Stage(24, 2, 2, 3, 6),
    Stage(40, 2, 2, 5, 6),
    Stage(80, 3, 2, 3, 6),
    Stage(112, 3, 1, 5, 6),
    Stage(192, 4, 2, 5, 6),
    Stage(320, 1, 1, 3, 6),
)
WIDTH_DEPTH = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite2": (1.1, 1.2),
}
BN_EPS = 1e-3
BN_MOMENTUM = 0.01

Net = TypeVar("Net", bound=nn.Module)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding (before, after) for one axis of `size` pixels."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def same_conv(x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, stride: int, *, depthwise: bool) -> Tensor:
    """Convolution whose output has ceil(size / stride) pixels, padded as TensorFlow does."""
    if depthwise and x_BCHW.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # oneDNN's backward of a depthwise convolution is five times slower in bfloat16 than in float32.
        with torch.autocast("cpu", enabled=False):
            return same_conv(x_BCHW.float(), weight, bias, stride, depthwise=True).to(torch.bfloat16)
    top, bottom = same_padding(x_BCHW.shape[2], weight.shape[2], stride)
    left, right = same_padding(x_BCHW.shape[3], weight.shape[3], stride)
    padding = (top, left)
    if top != bottom or left != right:
        x_BCHW, padding = F.pad(x_BCHW, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x_BCHW, weight, bias, stride, padding, groups=x_BCHW.shape[1] if depthwise else 1)


class SameConv2d(nn.Conv2d):
    """`same_conv` as a module, plain or depthwise."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return same_conv(x_BCHW, self.weight, self.bias, self.stride[0], depthwise=self.groups > 1)


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """SAME convolution, batch norm and (unless a linear projection) ReLU6."""
    layers: list[nn.Module] = [
        SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=BN_EPS, momentum=BN_MOMENTUM),
    ]
    if act:
        layers.append(nn.ReLU6())
    return nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    """MBConv without squeeze-and-excitation: expand 1x1, depthwise kxk, project 1x1, add when shapes agree."""

    def __init__(self, inputs: int, outputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        hidden = inputs * stage.expansion
        layers = [conv_bn(inputs, hidden, 1)] if stage.expansion != 1 else []
        layers.append(conv_bn(hidden, hidden, stage.kernel, stride, groups=hidden))
        layers.append(conv_bn(hidden, outputs, 1, act=False))
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs
        self.drop_path = 0.0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.body(x_BCHW)
        if not self.residual:
            return y_BCHW
        if self.training and self.drop_path:
            keep = 1.0 - self.drop_path
            kept_B111 = torch.rand(len(x_BCHW), 1, 1, 1, dtype=y_BCHW.dtype) < keep
            y_BCHW = y_BCHW * kept_B111 / keep
        return x_BCHW + y_BCHW


class Classifier(nn.Module):
    """1x1 convolution to 1,280 features, mean over pixels, linear layer: features_BCHW -> logits_BK."""

    def __init__(self, inputs: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.features = conv_bn(inputs, FEATURE_CHANNELS, 1)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(FEATURE_CHANNELS, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.dropout(self.features(x_BCHW).mean((2, 3))))
        return logits


class EfficientNetLite(Blocks):
    """`blocks[0]` is the stem, `blocks[-1]` the classifier."""

    def __init__(self, name: str, classes: int, dropout: float = 0.2) -> None:
        width, depth = WIDTH_DEPTH[name]
        blocks: list[nn.Module] = [conv_bn(3, STEM_CHANNELS, 3, stride=2)]
        channels = [STEM_CHANNELS]
        for index, stage in enumerate(STAGES):
            edge_stage = index in (0, len(STAGES) - 1)
            repeats = stage.blocks if edge_stage else math.ceil(stage.blocks * depth)
            outputs = round_channels(stage.channels * width)
            for repeat in range(repeats):
                stride = stage.stride if repeat == 0 else 1
                blocks.append(InvertedResidual(channels[-1], outputs, stage, stride))
                channels.append(outputs)
        blocks.append(Classifier(channels[-1], classes, dropout))
        super().__init__(blocks, channels)

    def set_drop_path(self, last: float) -> None:
        """Stochastic depth rising linearly to `last` at the deepest block."""
        for index, block in enumerate(self.blocks):
            if isinstance(block, InvertedResidual):
                block.drop_path = last * index / len(self.blocks)


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` that is not more than 10 % below `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def fuse_batch_norms(net: Net) -> Net:
    """Fold every batch norm into the convolution before it, in place; `net` must be in eval mode."""
    for layers in (module for module in net.modules() if isinstance(module, nn.Sequential)):
        for index in range(len(layers) - 1):
            conv, norm = layers[index], layers[index + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                layers[index] = fuse_conv_bn_eval(conv, norm)
                layers[index + 1] = nn.Identity()
    return net
