"""A network as a sequence of blocks that can be split between any two."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Blocks(nn.Module):
    """The whole network: images_B3HW -> logits_BK.

    Any cut k gives `tail(head(x)) == whole(x)` with head = blocks[:k], tail = blocks[k:].
    """

    def __init__(self, blocks: Sequence[nn.Module], channels: Sequence[int]) -> None:
        """`channels`: output channels of each block except the last."""
        super().__init__()
        self.channels = list(channels)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        logits_BK: Tensor = self.blocks(images_B3HW)
        return logits_BK

    def section(self, start: int, stop: int | None = None) -> nn.Sequential:
        """Blocks `start` to `stop`, which share their weights with the whole."""
        return nn.Sequential(*list(self.blocks)[start:stop])
