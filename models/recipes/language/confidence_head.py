"""Train the confidence head of an exit or local model, on texts that these were not trained on.

    features of choices, whether they are the full model's --L-BFGS--> head --threshold--> which exit decodes each token

The inputs are `handoff.confidence_head.features`. Source: a learnt confidence is better calibrated than the softmax
(CALM, Schuster et al., 2022, section 3.5); here its target is agreement with the full model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN, STEPS, DECAY = 16, 300, 1e-5


def train_confidence_head(features_NF: Tensor, right_N: Tensor, seed: int) -> nn.Sequential:
    """A trained head. The normalisation of its inputs is folded into the first layer."""
    torch.manual_seed(seed)
    mean_F, deviation_F = features_NF.mean(0), features_NF.std(0) + 1e-3
    normal_NF, target_N = (features_NF - mean_F) / deviation_F, right_N.float()
    first, second = nn.Linear(features_NF.shape[1], HIDDEN), nn.Linear(HIDDEN, 1)
    optimizer = torch.optim.LBFGS(
        [*first.parameters(), *second.parameters()], max_iter=STEPS, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logit_N = second(F.relu(first(normal_NF)))[:, 0]
        decay = DECAY * (first.weight.square().sum() + second.weight.square().sum())
        loss = F.binary_cross_entropy_with_logits(logit_N, target_N) + decay
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        first.weight.div_(deviation_F)
        first.bias.sub_(first.weight @ mean_F)
    return nn.Sequential(first, nn.ReLU(), second).eval()


def head_tensors(head: nn.Sequential) -> dict[str, NDArray[Any]]:
    """The tensors of a head, by the names that a bundle stores them under."""
    return {f"judge.{name}": value.detach().numpy() for name, value in head.state_dict().items()}


@torch.inference_mode()
def confidences(head: nn.Sequential, features_NF: Tensor) -> Tensor:
    """How likely each choice is right (N,)."""
    confidence_N1: Tensor = torch.sigmoid(head(features_NF))
    return confidence_N1[:, 0]


@dataclass(frozen=True)
class ExitDecisions:
    """Decisions of exits at a threshold, for N tokens.

    sure_N: whether the token is decoded from an exit. exit_N: index of that exit. right_N: whether the exit's choice is
    the full model's.
    """

    sure_N: Tensor
    exit_N: Tensor
    right_N: Tensor

    def select(self, chosen_N: Tensor) -> ExitDecisions:
        """The decisions for some of the tokens."""
        return ExitDecisions(self.sure_N[chosen_N], self.exit_N[chosen_N], self.right_N[chosen_N])

    @property
    def coverage(self) -> float:
        """Share of tokens that are decoded from an exit."""
        return float(self.sure_N.float().mean())

    @property
    def agreement(self) -> float:
        """Share of the tokens decoded from an exit that are right; 1 without such tokens."""
        return float(self.right_N[self.sure_N].float().mean()) if self.sure_N.any() else 1.0


def decide(confidence_EN: Tensor, right_EN: Tensor, threshold: float) -> ExitDecisions:
    """Each token is decoded from the first exit whose confidence reaches the threshold."""
    sure_EN = confidence_EN >= threshold
    first_N = sure_EN.int().argmax(0)
    return ExitDecisions(sure_EN.any(0), first_N, right_EN.gather(0, first_N[None])[0])
