"""A slimmable encoder: one set of int8 weights, several widths, image -> latent.

    image_B3HW -> the backbone's first blocks, at a width -> one more, its projection down to the latent -> latent_BCHW

At width w every layer uses the first share w of its channels; each width has its own scale and bias after each
convolution.
Weights count one byte each on the device: they are trained rounded to 8 bits, and shipped so.
Sources: slimmable networks with switchable batch norm, Yu et al. (ICLR 2019); slimmable encoders for split computing,
Assine et al. (WoWMoM 2023); straight-through rounding, Jacob et al. (CVPR 2018), weights only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.vision.efficientnet_lite import BN_EPS, BN_MOMENTUM, InvertedResidual, SameConv2d, same_conv

INT8_MAX = 127


def share(channels: int, width: float) -> int:
    """Channels of a layer at a width."""
    return max(1, round(channels * width))


def int8_scale(weight: Tensor) -> Tensor:
    """Step of each output channel's 8-bit weights, shape (O, 1, 1, 1)."""
    return weight.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-8) / INT8_MAX


def rounded(weight: Tensor) -> Tensor:
    """The weight rounded to 8 bits, with a straight-through gradient."""
    scale = int8_scale(weight)
    return weight + ((weight / scale).round() * scale - weight).detach()


class SlimConv(nn.Module):
    """SAME convolution of which a width uses the first channels, batch norm of that width, ReLU6 unless linear."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        *,
        depthwise: bool,
        act: bool,
        widths: Iterable[float],
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, 1 if depthwise else inputs, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out")
        self.channels = tuple(share(outputs, width) for width in widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, eps=BN_EPS, momentum=BN_MOMENTUM) for c in self.channels)
        self.stride, self.depthwise, self.act = stride, depthwise, act

    def forward(self, x_BCHW: Tensor, width: int) -> Tensor:
        weight = rounded(self.weight)[: self.channels[width], : 1 if self.depthwise else x_BCHW.shape[1]]
        y_BCHW = same_conv(x_BCHW, weight, None, self.stride, depthwise=self.depthwise)
        y_BCHW = self.norms[width](y_BCHW)
        return F.relu6(y_BCHW) if self.act else y_BCHW

    @torch.no_grad()
    def start(self, weight: Tensor, norm: nn.BatchNorm2d) -> None:
        """Initialise every width from a weight and the batch norm after it."""
        self.weight.copy_(weight)
        for channels, own in zip(self.channels, self.norms, strict=True):
            for name, tensor in own.state_dict().items():
                source = norm.state_dict()[name]
                tensor.copy_(source[:channels] if source.ndim else source)


class SlimBlock(nn.Module):
    """The convolutions of a stem or an inverted residual, one after another; added to the input when shapes agree."""

    def __init__(self, convs: Iterable[SlimConv], *, residual: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.residual = residual

    def forward(self, x_BCHW: Tensor, width: int) -> Tensor:
        y_BCHW = x_BCHW
        for conv in self.convs:
            y_BCHW = conv(y_BCHW, width)
        return x_BCHW + y_BCHW if self.residual else y_BCHW

    def load(self, pairs: Iterable[tuple[SameConv2d, nn.BatchNorm2d]]) -> None:
        """Copy the weights of the first convolutions, as many as given."""
        for conv, (source, norm) in zip(self.convs, pairs, strict=False):
            assert isinstance(conv, SlimConv)
            conv.start(source.weight, norm)


class SlimFront(nn.Module):
    """The backbone's first blocks, slimmable: image -> features."""

    def __init__(self, backbone: Iterable[nn.Module], widths: tuple[float, ...]) -> None:
        """`backbone`: the blocks to repeat; their shapes are copied here, their weights by `load`."""
        super().__init__()
        self.blocks = nn.ModuleList(slim_block(block, widths) for block in backbone)

    def forward(self, images_B3HW: Tensor, width: int) -> Tensor:
        x_BCHW = images_B3HW
        for block in self.blocks:
            x_BCHW = block(x_BCHW, width)
        return x_BCHW

    def load(self, backbone: Iterable[nn.Module]) -> None:
        """Copy the weights of the backbone's first blocks."""
        for own, block in zip(self.blocks, backbone, strict=True):
            assert isinstance(own, SlimBlock)
            own.load(conv_norms(block))


class SlimEncoder(nn.Module):
    """Image -> latent at one of `widths`, narrowest first."""

    def __init__(self, backbone: nn.Sequential, latent: int, widths: tuple[float, ...]) -> None:
        """`backbone`: the blocks to repeat; the last becomes the bottleneck, with `latent` output channels."""
        super().__init__()
        self.widths = widths
        *first, last = backbone
        self.front = SlimFront(first, widths)
        self.bottleneck = slim_block(last, widths, latent)

    def forward(self, images_B3HW: Tensor, width: int = -1) -> Tensor:
        latent_BCHW: Tensor = self.bottleneck(self.front(images_B3HW, width), width)
        return latent_BCHW


def conv_norms(block: nn.Module) -> list[tuple[SameConv2d, nn.BatchNorm2d]]:
    """The convolutions of a backbone block, each with its batch norm."""
    modules = list(block.modules())
    convs = [module for module in modules if isinstance(module, SameConv2d)]
    norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
    return list(zip(convs, norms, strict=True))


def slim_block(block: nn.Module, widths: tuple[float, ...], outputs: int | None = None) -> SlimBlock:
    """A slimmable block of the shape of a backbone's; with `outputs`, every width has as many output channels."""
    residual = isinstance(block, InvertedResidual)
    convs = [conv for conv, _ in conv_norms(block)]
    return SlimBlock(
        (
            SlimConv(
                conv.in_channels,
                outputs if outputs and conv is convs[-1] else conv.out_channels,
                conv.kernel_size[0],
                conv.stride[0],
                depthwise=conv.groups > 1,
                act=not (residual and conv is convs[-1]),
                widths=(1.0,) * len(widths) if outputs and conv is convs[-1] else widths,
            )
            for conv in convs
        ),
        residual=isinstance(block, InvertedResidual) and block.residual and not outputs,
    )


class FrozenSlim(nn.Module):
    """An encoder as it is shipped: int8 weights once, float16 scale and bias for each width."""

    def __init__(self, encoder: SlimEncoder) -> None:
        super().__init__()
        self.widths = len(encoder.widths)
        self.blocks = nn.ModuleList(FrozenBlock(block) for block in (*encoder.front.blocks, encoder.bottleneck))

    def forward(self, x_B3HW: Tensor, width: int) -> Tensor:
        """The latent of one width."""
        for block in self.blocks:
            x_B3HW = block(x_B3HW, width)
        return x_B3HW


class FrozenBlock(nn.Module):
    def __init__(self, block: SlimBlock) -> None:
        super().__init__()
        self.convs = nn.ModuleList(FrozenConv(conv) for conv in block.convs)
        self.residual = block.residual

    def forward(self, x_BCHW: Tensor, width: int) -> Tensor:
        y_BCHW = x_BCHW
        for conv in self.convs:
            y_BCHW = conv(y_BCHW, width)
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class FrozenConv(nn.Module):
    """Batch norm folded into scale and bias. Buffers: `weight` int8; `scale0`, `bias0` … float16, one pair a width."""

    weight: Tensor

    @torch.no_grad()
    def __init__(self, conv: SlimConv) -> None:
        super().__init__()
        step = int8_scale(conv.weight)
        self.register_buffer("weight", (conv.weight / step).round().to(torch.int8))
        for width, norm in enumerate(conv.norms):
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            self.register_buffer(f"scale{width}", (step[: len(gain), 0, 0, 0] * gain).half())
            self.register_buffer(f"bias{width}", (norm.bias - norm.running_mean * gain).half())
        self.channels, self.stride, self.depthwise, self.act = conv.channels, conv.stride, conv.depthwise, conv.act

    def forward(self, x_BCHW: Tensor, width: int) -> Tensor:
        inputs = 1 if self.depthwise else x_BCHW.shape[1]
        scale = self.get_buffer(f"scale{width}").float()
        weight = self.weight[: self.channels[width], :inputs].float() * scale[:, None, None, None]
        bias = self.get_buffer(f"bias{width}").float()
        y_BCHW = same_conv(x_BCHW, weight, bias, self.stride, depthwise=self.depthwise)
        return F.relu6(y_BCHW) if self.act else y_BCHW
