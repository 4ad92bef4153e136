"""What crosses a cut, as one map (B, C, H, W): feature maps of one or several scales, or a sequence of tokens.

    (B, C, H, W)             as it is
    (B, H, W, C)             channels first
    (B, N, D)                tokens on the grid that they have in the image; class tokens and their like in a row above
    maps of several scales   all on the middle one's grid: finer ones as channels of a pixel, coarser ones repeated

`Pack` and `Unpack` are each other's inverse; a bottleneck then sees one map of any network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PREFIX = 8  # tokens that lie on no grid: class, distillation, registers
MAX_FACTOR = 8  # between the sides of the middle map and another one

Shape = tuple[int, int, int]
Form = Literal["map", "last", "tokens", "columns"]  # (B, C, H, W), (B, H, W, C), (B, N, D), (B, D, N)


@dataclass(frozen=True)
class Layout:
    """One tensor as a map (B, C, H, W). prefix: tokens before those of the grid, which get a row of their own."""

    form: Form
    shape: Shape
    prefix: int = 0

    @property
    def values(self) -> int:
        """Numbers of the tensor for one image."""
        channels, height, width = self.shape
        return channels * (height * width - (width - self.prefix if self.prefix else 0))

    def to_map(self, x: Tensor) -> Tensor:
        """The tensor -> (B, C, H, W)."""
        if self.form == "map":
            return x
        if self.form == "last":
            return x.permute(0, 3, 1, 2)
        channels, height, width = self.shape
        x_BDN = x.transpose(1, 2) if self.form == "tokens" else x
        if self.prefix:
            first_BDN = F.pad(x_BDN[:, :, : self.prefix], (0, width - self.prefix))
            x_BDN = torch.cat([first_BDN, x_BDN[:, :, self.prefix :]], 2)
        return x_BDN.reshape(-1, channels, height, width)

    def from_map(self, map_BCHW: Tensor) -> Tensor:
        """The inverse of `to_map`, laid out anew: what follows may ask for a view."""
        if self.form == "map":
            return map_BCHW
        if self.form == "last":
            return map_BCHW.permute(0, 2, 3, 1).contiguous()
        x_BDN = map_BCHW.flatten(2)
        if self.prefix:
            x_BDN = torch.cat([x_BDN[:, :, : self.prefix], x_BDN[:, :, self.shape[2] :]], 2)
        return (x_BDN.transpose(1, 2) if self.form == "tokens" else x_BDN).contiguous()


def token_layout(count: int, channels: int, form: Form, image: tuple[int, int]) -> Layout:
    """Tokens as they lie in an image of this height and width; in one row where they are no grid of its proportions."""
    for prefix in range(min(count - 1, MAX_PREFIX) + 1):
        width = round(((count - prefix) * image[1] / image[0]) ** 0.5)
        height = (count - prefix) // max(width, 1)
        if width * height == count - prefix and width * image[0] == height * image[1] and prefix <= width:
            return Layout(form, (channels, height + (prefix > 0), width), prefix)
    return Layout(form, (channels, 1, count))


def layouts_of(values: Sequence[Tensor], axes: Sequence[int | None], image: tuple[int, int]) -> list[Layout] | None:
    """How tensors cross, whose channels are at `axes`; None where they do not make one map."""
    found = []
    for value, axis in zip(values, axes, strict=True):
        _, *sizes = value.shape
        if value.ndim == 4 and axis in (1, 3, None):
            channels_last = axis == 3
            height, width, channels = sizes if channels_last else (*sizes[1:], sizes[0])
            found.append(Layout("last" if channels_last else "map", (channels, height, width)))
        elif value.ndim == 3 and axis in (1, 2) and len(values) == 1:
            count, channels = sizes if axis == 2 else sizes[::-1]
            found.append(token_layout(count, channels, "tokens" if axis == 2 else "columns", image))
        else:
            return None
    return found if all(factor(layout, reference(found)) for layout in found) else None


def reference(layouts: Sequence[Layout]) -> Layout:
    """The layout whose grid all share: the middle one by size."""
    return sorted(layouts, key=lambda layout: layout.shape[1:])[(len(layouts) - 1) // 2]


def factor(layout: Layout, grid: Layout) -> int:
    """How much finer a map is than the grid, below -1 how much coarser; 0 where neither is a multiple of the other."""
    (_, height, width), (_, rows, columns) = layout.shape, grid.shape
    for times in range(1, MAX_FACTOR + 1):
        if (height, width) == (rows * times, columns * times):
            return times
        if (height * times, width * times) == (rows, columns):
            return -times
    return 0


class Crossing(nn.Module):
    """The layouts of what crosses a cut, and their factors of the shared grid."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        super().__init__()
        self.layouts = tuple(layouts)
        grid = reference(self.layouts)
        self.factors = [factor(layout, grid) for layout in self.layouts]
        self.widths = [
            layout.shape[0] * max(times, 1) ** 2 for layout, times in zip(self.layouts, self.factors, strict=True)
        ]
        self.shape: Shape = (sum(self.widths), *grid.shape[1:])

    @property
    def values(self) -> int:
        """Numbers that cross for one image."""
        return sum(layout.values for layout in self.layouts)


class Pack(Crossing):
    """Tensors -> one map."""

    def forward(self, *tensors: Tensor) -> Tensor:
        maps = []
        for layout, times, tensor in zip(self.layouts, self.factors, tensors, strict=True):
            map_BCHW = layout.to_map(tensor)
            if times > 1:
                map_BCHW = F.pixel_unshuffle(map_BCHW, times)
            elif times < -1:
                map_BCHW = F.interpolate(map_BCHW, scale_factor=-times, mode="nearest")
            maps.append(map_BCHW)
        return torch.cat(maps, 1) if len(maps) > 1 else maps[0]


class Unpack(Crossing):
    """One map -> tensors; of repeated values the mean."""

    def forward(self, packed_BCHW: Tensor) -> tuple[Tensor, ...]:
        parts = torch.split(packed_BCHW, self.widths, 1) if len(self.widths) > 1 else (packed_BCHW,)
        found = []
        for layout, times, map_BCHW in zip(self.layouts, self.factors, parts, strict=True):
            if times > 1:
                map_BCHW = F.pixel_shuffle(map_BCHW, times)
            elif times < -1:
                map_BCHW = F.avg_pool2d(map_BCHW, -times)
            found.append(layout.from_map(map_BCHW))
        return tuple(found)
