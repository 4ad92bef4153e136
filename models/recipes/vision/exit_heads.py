"""Exits of a transformer: convolutions over neighbouring tokens for early layers, attention over all for later ones.

Tokens come as a map (B, D, H, W), a grid as they lie in the image. Early layers see edges and textures, and lack a view
of the whole: LGViT's local perception heads add neighbours by depthwise convolutions. Later layers have it: its global
aggregation heads attend to a quarter of the tokens. Both are a fraction of a layer.
Source: Xu et al., "LGViT: Dynamic Early Exiting for Accelerating Vision Transformer" (ACM Multimedia 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 2  # of the local head's hidden layer, times the token's
HEADS = 4  # of attention, where the token's width divides by it
POOL = 2  # tokens that become one along each side, for the global head


class LocalHead(nn.Module):
    """Pointwise, depthwise 3x3, pointwise convolution; mean and maximum over tokens; a linear layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        hidden = WIDTH * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, inputs, 1, bias=False),
            nn.BatchNorm2d(inputs),
        )
        self.linear = nn.Linear(2 * inputs, classes)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        hidden_BCHW = self.body(features_BCHW).relu()
        logits_BK: Tensor = self.linear(torch.cat([hidden_BCHW.mean((2, 3)), hidden_BCHW.amax((2, 3))], 1))
        return logits_BK


class GlobalHead(nn.Module):
    """Tokens pooled to a quarter, attention among them, mean and maximum; a linear layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.heads = HEADS if inputs % HEADS == 0 else 1
        self.norm = nn.LayerNorm(inputs)
        self.mix = nn.Linear(inputs, 3 * inputs)
        self.out = nn.Linear(inputs, inputs)
        self.linear = nn.Linear(2 * inputs, classes)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        pooled_BCHW = F.avg_pool2d(features_BCHW, POOL, ceil_mode=True)
        tokens_BND = self.norm(pooled_BCHW.flatten(2).transpose(1, 2))
        query, key, value = self.mix(tokens_BND).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen_BND = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens_BND = (tokens_BND + self.out(seen_BND)).relu()
        logits_BK: Tensor = self.linear(torch.cat([tokens_BND.mean(1), tokens_BND.amax(1)], 1))
        return logits_BK


def token_exits(widths: list[int], classes: int) -> nn.ModuleList:
    """A head after each cut: local ones for the first half, global ones for the others."""
    local = (len(widths) + 1) // 2
    heads = [LocalHead if index < local else GlobalHead for index in range(len(widths))]
    return nn.ModuleList(head(width, classes) for head, width in zip(heads, widths, strict=True))
