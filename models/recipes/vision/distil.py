"""Exits and a bottleneck distilled from a frozen, trained classifier.

    images -> trunk (frozen) -> exits                                  <- cloud logits, labels
                             -> encoder -> round -> decoder -> tail    <- cloud logits, labels, tail features, bits

Three stages. The first two are Entropic Student's (Matsubara et al., WACV 2022), the first of them with the joint loss
of Duan & Zhu ("Efficient Feature Compression for Edge-Cloud Systems", PCS 2022); the second freezes encoder and priors
and tunes the decoder. The third unfreezes the tail, which adapts to both original and decoded features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.recipes.common.trainer import Batches, Loss, Run, Schedule
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.vision.split import SplitClassifier, Tap


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of the loss. `labels`: the label's share of the task's target; the rest is the teacher's."""

    task: float = 1.0
    labels: float = 0.5
    features: float = 1.0


class Distillation(nn.Module):
    """The split model with the parts that only training needs: gains and one learned prior a rate."""

    def __init__(
        self,
        split: SplitClassifier,
        tap: int,
        per_kilobyte: tuple[float, ...],
        log_gains: tuple[float, float] = (1.0, 2.5),
    ) -> None:
        """`tap`: the one after the last segment. If it has a tail of its own, the backbone's stays unchanged.

        `log_gains`: initial log gains of the highest and the lowest price.
        """
        super().__init__()
        self.split = split
        self.index = tap
        self.weights = LossWeights()
        self.rates = Rates(self.tap.latent_channels, per_kilobyte, log_gains=log_gains)
        split.requires_grad_(False)
        self.tap.requires_grad_(True)
        split.exits.requires_grad_(True)
        if self.tap.tail is not None:
            self.tap.tail.requires_grad_(False)

    @property
    def tap(self) -> Tap:
        """The bottleneck in training; it is in the state dict once, under `split`."""
        return self.split.tap(self.index)

    def train(self, mode: bool = True) -> Distillation:
        """Frozen modules stay in eval mode, so that their batch-norm statistics do not change."""
        super().train(mode)
        for module in (*self.split.children(), *self.tap.children()):
            if module is self.split.backbone or not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def freeze_encoder(self) -> None:
        """Second stage: freeze encoder, rates and exits."""
        for module in (self.tap.encoder, self.rates, self.split.exits):
            module.requires_grad_(False)

    def free_tail(self) -> None:
        """Third stage: unfreeze the tail, for original and decoded features alike unless it is the tap's own."""
        (self.tap.tail or self.split.backbone.blocks[self.split.cuts[-1] :]).requires_grad_(True)

    def loss(self, images_B3HW: Tensor, target_BK: Tensor, ramp: float = 1.0) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of one batch, whose inputs take the rates in turn.

        `ramp` in [0, 1] scales the price of bytes; the full price from the start collapses the latent for good.
        """
        split, labels = self.split, self.weights.labels
        tail = split.backbone.section(split.cuts[-1])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = [split.segment(0, images_B3HW)]
            for index in range(1, len(split.cuts)):
                features.append(split.segment(index, features[-1]))
        with torch.autocast("cpu", torch.bfloat16):
            original = tail_points(tail, features[-1])
        teacher = [point.detach() for point in original]
        rate_B = torch.arange(len(images_B3HW)) % len(self.rates.per_kilobyte)
        with torch.autocast("cpu", torch.bfloat16):
            latent_BCHW = self.tap.encoder(features[-1])
        bits_B, latent_BCHW = self.rates(latent_BCHW, rate_B)
        with torch.autocast("cpu", torch.bfloat16):
            decoded_BCHW = self.tap.decoder(latent_BCHW, rate_B)
        with torch.autocast("cpu", torch.bfloat16):
            exits = [head(f) for head, f in zip(split.exits, features, strict=True)]
            student = tail_points(self.tap.tail or tail, decoded_BCHW)
        wanted_BK = teacher[-1].float().softmax(1)
        task = answer_loss(student[-1], wanted_BK, target_BK, labels)
        exit_loss = sum((answer_loss(e, wanted_BK, target_BK, labels) for e in exits), start=torch.zeros(()))
        pairs = [(features[-1], decoded_BCHW), *zip(teacher[:-1], student[:-1], strict=True)]
        distance = sum((relative_distance(t, s) for t, s in pairs), start=torch.zeros(())) / len(pairs)
        rate_loss, bytes_each = self.rates.price(bits_B, rate_B)
        clean = F.cross_entropy(original[-1].float(), target_BK)  # without gradient while the tail is frozen
        figures = {"clean": clean.item(), "task": task.item(), "exits": exit_loss.item(), "features": distance.item()}
        figures |= bytes_each
        return (
            clean + self.weights.task * task + exit_loss + self.weights.features * distance + ramp * rate_loss,
            figures,
        )


def train_in_stages(
    run: Run,
    module: Distillation,
    ramped: Batches,
    batches: Batches,
    loss_of: Loss,
    epochs: tuple[int, int, int],
    steps: int,
) -> Distillation:
    """Run all three stages, with `epochs` epochs each of `steps` batches; returns the averaged module, in eval mode.

    The first stage trains on `ramped`, whose price of bytes grows; the others on `batches`.
    """
    bottleneck_epochs, decoder_epochs, tail_epochs = epochs
    # The stage's name seeds its randomness, and trained bundles were made with this one.
    average = run.fit("bridge", module, ramped, loss_of, Schedule(bottleneck_epochs, steps, peak_lr=2e-3))
    module.load_state_dict(average.state_dict())
    module.freeze_encoder()
    average = run.fit("decoder", module, batches, loss_of, Schedule(decoder_epochs, steps, peak_lr=5e-4))
    module.load_state_dict(average.state_dict())
    module.free_tail()
    average = run.fit("tail", module, batches, loss_of, Schedule(tail_epochs, steps, peak_lr=2e-4))
    assert isinstance(average, Distillation)
    return average


def tail_points(tail: nn.Module, features_BCHW: Tensor) -> list[Tensor]:
    """Features half-way through the tail and before the classifier, then logits."""
    blocks = list(tail.children())
    half = len(blocks) // 2
    middle = nn.Sequential(*blocks[:half])(features_BCHW)
    last = nn.Sequential(*blocks[half:-1])(middle)
    return [middle, last, blocks[-1](last)]


def answer_loss(logits_BK: Tensor, wanted_BK: Tensor, target_BK: Tensor, labels: float) -> Tensor:
    """Cross-entropy to a mixture of the cloud model's answer and the label, whose share is `labels`."""
    return F.cross_entropy(logits_BK.float(), (1 - labels) * wanted_BK + labels * target_BK)


def relative_distance(requested: Tensor, got: Tensor) -> Tensor:
    """Mean squared error in units of the wanted tensor's variance."""
    requested = requested.float()
    return F.mse_loss(got.float(), requested) / requested.var().clamp_min(1e-6)
