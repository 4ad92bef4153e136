"""How likely an exit's choice is the full model's: a small head, trained where exits were not.

It looks at what `handoff.confidence_head.evidence` gives. Source: a learnt confidence beats the softmax's own
(CALM, Schuster et al., 2022, section 3.5); here its target is agreement with the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN, STEPS, DECAY = 16, 300, 1e-5


def train_judge(seen_NF: Tensor, right_N: Tensor, seed: int) -> nn.Sequential:
    """A judge; what it sees is scaled inside of its first layer."""
    torch.manual_seed(seed)
    mean_F, deviation_F = seen_NF.mean(0), seen_NF.std(0) + 1e-3
    normal_NF, wanted_N = (seen_NF - mean_F) / deviation_F, right_N.float()
    first, second = nn.Linear(seen_NF.shape[1], HIDDEN), nn.Linear(HIDDEN, 1)
    optimizer = torch.optim.LBFGS(
        [*first.parameters(), *second.parameters()], max_iter=STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        likely_N = second(F.relu(first(normal_NF)))[:, 0]
        decay = DECAY * (first.weight.square().sum() + second.weight.square().sum())
        found = F.binary_cross_entropy_with_logits(likely_N, wanted_N) + decay
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        first.weight.div_(deviation_F)
        first.bias.sub_(first.weight @ mean_F)
    return nn.Sequential(first, nn.ReLU(), second).eval()


@torch.inference_mode()
def judged(judge: nn.Sequential, seen_NF: Tensor) -> Tensor:
    """How likely (N,) each choice is right."""
    likely_N1: Tensor = torch.sigmoid(judge(seen_NF))
    return likely_N1[:, 0]


@dataclass(frozen=True)
class Decided:
    """Which tokens exits decide at a threshold (N,), by which exit, and which choices are the full model's (N,)."""

    sure_N: Tensor
    exit_N: Tensor
    right_N: Tensor

    def at(self, here_N: Tensor) -> Decided:
        """Of some of the tokens alone."""
        return Decided(self.sure_N[here_N], self.exit_N[here_N], self.right_N[here_N])

    @property
    def coverage(self) -> float:
        return float(self.sure_N.float().mean())

    @property
    def agreement(self) -> float:
        """Of those decided; 1 when there are none."""
        return float(self.right_N[self.sure_N].float().mean()) if self.sure_N.any() else 1.0


def decided(likely_EN: Tensor, right_EN: Tensor, confidence: float) -> Decided:
    """Each token is decided by the first exit that reaches the threshold."""
    sure_EN = likely_EN >= confidence
    first_N = sure_EN.int().argmax(0)
    return Decided(sure_EN.any(0), first_N, right_EN.gather(0, first_N[None])[0])
