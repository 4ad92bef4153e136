"""Random augmentations of a batch of photographs, for training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_dihedral(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """One of the eight flips and quarter turns for each image; a solar cell has no natural orientation."""
    codes = torch.randint(8, (len(images_BCHW),), generator=generator).tolist()
    return torch.cat([dihedral(images_BCHW[i : i + 1], code) for i, code in enumerate(codes)])


def dihedral(images_BCHW: Tensor, code: int) -> Tensor:
    """Flip or quarter turn number `code`, 0 to 7; 0 is the identity."""
    views_BCHW = torch.rot90(images_BCHW, code % 4, (2, 3))
    return views_BCHW.flip(3) if code >= 4 else views_BCHW


def random_mirror(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images horizontally."""
    chosen_B = torch.rand(len(images_BCHW), generator=generator) < 0.5
    return torch.where(chosen_B[:, None, None, None], images_BCHW.flip(3), images_BCHW)


def random_affine(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 6 degrees, zoom by up to 10 %, shift by up to 4 % of the side; edges are reflected."""
    count = len(images_BCHW)
    low_high = torch.rand(4, count, generator=generator) * 2 - 1
    angle, zoom = low_high[0] * math.radians(6), torch.exp(low_high[1] * math.log(1.1))
    rows = [
        torch.stack([zoom * torch.cos(angle), -zoom * torch.sin(angle), low_high[2] * 0.08], 1),
        torch.stack([zoom * torch.sin(angle), zoom * torch.cos(angle), low_high[3] * 0.08], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW, grid, padding_mode="reflection", align_corners=False)


def random_contrast(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness and contrast by up to 20 %, clamped to [0, 1]."""
    low_high = torch.rand(2, len(images_BCHW), 1, 1, 1, generator=generator) * 0.4 - 0.2
    mean_B111 = images_BCHW.mean((1, 2, 3), keepdim=True)
    return ((images_BCHW - mean_B111) * (1 + low_high[0]) + mean_B111 * (1 + low_high[1])).clamp(0, 1)
