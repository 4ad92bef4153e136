"""A small head for one more task, on the features that the first task uses: original, and decoded at every rate.

Everything else is frozen: the head changes no other answer. Matsubara et al., "Ladon" (WACV 2025), train a
decoder and several tails for one encoder; here the tail's features already carry what another task needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision.bottleneck import BottleneckModel
from isthmus.models.recipes.vision.views import BATCH, Views

EPOCHS = 4

HeadBatch = tuple[Tensor, Tensor, Tensor]  # front features, original features after the last cut, classes


class HeadTraining(nn.Module):
    """The head and a trained bottleneck; half of every batch is decoded features, half original ones."""

    def __init__(self, head: nn.Module, bottleneck: BottleneckModel) -> None:
        super().__init__()
        self.head = head
        self.bottleneck = bottleneck.requires_grad_(False)

    def train(self, mode: bool = True) -> HeadTraining:
        super().train(mode)
        self.bottleneck.eval()
        return self

    def loss(self, batch: HeadBatch) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy to the classes."""
        front_BCHW, features_BCHW, class_B = batch
        half = len(class_B) // 2
        rate_B = torch.arange(half) % len(self.bottleneck.rates.per_kilobyte)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latent_BCHW = self.bottleneck.encoder(front_BCHW[:half], -1)
            latent_BCHW = self.bottleneck.rates(latent_BCHW, rate_B)[1]
            decoded_BCHW = self.bottleneck.decode(latent_BCHW, rate_B)
        logits_BK = self.head(torch.cat([decoded_BCHW.float(), features_BCHW[half:]]))
        right = (logits_BK.argmax(1) == class_B).float().mean()
        return F.cross_entropy(logits_BK, class_B), {"right": right.item()}


def train_head(
    run: Run, name: str, head: nn.Module, bottleneck: BottleneckModel, views: Views, class_N: NDArray[np.int64]
) -> nn.Module:
    """Fit the head of task `name`; returns it averaged, in eval mode."""
    torch.manual_seed(run.seed)
    module = HeadTraining(head, bottleneck)

    def batches(epoch: int, generator: torch.Generator) -> Iterator[HeadBatch]:
        for indices, arrays in views.batches(generator, ["front", "features"]):
            yield arrays["front"], arrays["features"], torch.from_numpy(class_N[indices])

    average = run.fit(name, module, batches, module.loss, Schedule(EPOCHS, len(views) // BATCH, peak_lr=1e-3))
    assert isinstance(average, HeadTraining)
    return average.head
