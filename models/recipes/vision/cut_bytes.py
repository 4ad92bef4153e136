"""What each cut would send, measured before anything is trained: bytes at the same harm to the answer.

Features of some photos, and the gradients of their sampled answers, give each direction of what crosses a variance in
units of harm (`components`). Reverse water-filling over these variances is the rate of a Gaussian source (Cover &
Thomas, "Elements of Information Theory", section 10.3). What neighbours share is not counted, so that the numbers
compare cuts; a trained bottleneck with its context model sends less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from isthmus.models.recipes.vision.answer_loss import sampled_likelihood
from isthmus.models.recipes.vision.crossing import Pack
from isthmus.models.recipes.vision.cutting import Captured

HARM = 2.0  # squared gradient times squared error of an image, summed: about a nat of its answer
CANDIDATES, MOST_CHANNELS = 10, 1024  # cuts that are measured; channels of which components are taken
STEPS = 60  # of the search for the water level


class Recording(Interpreter):
    """Runs a graph and records what some nodes give."""

    def __init__(self, captured: Captured, nodes: set[Node]) -> None:
        super().__init__(captured.graph)
        self.nodes, self.values = nodes, dict[Node, Tensor]()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.nodes:
            self.values[n] = result
        return result


def candidates(captured: Captured, share: float) -> list[int]:
    """Indices of the cuts to measure: of each part of the operations up to `share`, the cut of the fewest values."""
    found: dict[int, int] = {}
    for index, cut in enumerate(captured.cuts):
        if cut.macs <= share * captured.macs and cut.shape[0] <= MOST_CHANNELS:
            part = min(int(CANDIDATES * cut.macs / (share * captured.macs)), CANDIDATES - 1)
            if part not in found or cut.values <= captured.cuts[found[part]].values:
                found[part] = index
    return sorted(found.values()) or [0]


@torch.enable_grad()
def measured_bytes(captured: Captured, indices: Sequence[int], images_N3HW: Tensor) -> dict[int, float]:
    """Bytes of an image at some cuts, at the same harm. `images_N3HW`: some, normalised."""
    recorded = {node for index in indices for node in captured.ends[index]}
    totals: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for image_13HW in torch.split(images_N3HW, 1):
        recording = Recording(captured, recorded)
        outputs = recording.run(image_13HW.detach().requires_grad_(True))
        nodes = list(recording.values)
        likelihood = sampled_likelihood(captured.kind, outputs, generator)
        gradients = torch.autograd.grad(likelihood, [recording.values[node] for node in nodes])
        gradient_of = dict(zip(nodes, gradients, strict=True))
        for index in indices:
            pack, ends = Pack(captured.layouts[index]), captured.ends[index]
            x_CN = flat(pack(*(recording.values[node].detach() for node in ends)))
            g_CN = flat(pack(*(gradient_of[node] for node in ends))) * repeats(pack)[:, None]
            mean_C, second_CC, harm_CC = totals.get(index, (0.0, 0.0, 0.0))
            totals[index] = mean_C + x_CN.mean(1), second_CC + x_CN @ x_CN.T / x_CN.shape[1], harm_CC + g_CN @ g_CN.T
    found = {}
    for index, (mean_C, second_CC, harm_CC) in totals.items():
        _, height, width = captured.cuts[index].shape
        positions, count = height * width, len(images_N3HW)
        covariance_CC = second_CC / count - torch.outer(mean_C, mean_C) / count**2
        found[index] = bits(variances(covariance_CC, harm_CC / (count * positions)), positions) / 8
    return found


def flat(map_1CHW: Tensor) -> Tensor:
    """Channels by positions."""
    return map_1CHW[0].flatten(1)


def repeats(pack: Pack) -> Tensor:
    """By which the gradient of each channel is divided among its repeats."""
    shares = [1 / times**2 if times < -1 else 1.0 for times in pack.factors]
    return torch.cat([torch.full((width,), share) for width, share in zip(pack.widths, shares, strict=True)])


def variances(covariance_CC: Tensor, harm_CC: Tensor) -> Tensor:
    """Of independent directions, in units of harm; none negative."""
    values_C, vectors_CC = torch.linalg.eigh(harm_CC.double())
    root_CC = vectors_CC @ torch.diag(values_C.clamp_min(0).sqrt()) @ vectors_CC.T
    found_C: Tensor = torch.linalg.eigvalsh(root_CC @ covariance_CC.double() @ root_CC)
    return found_C.clamp_min(0)


def bits(variance_C: Tensor, positions: int) -> float:
    """Of an image whose error does HARM altogether: half the logarithm of each variance above the water."""
    if float(variance_C.sum()) * positions <= HARM:
        return 0.0
    low, high = 0.0, float(variance_C.max())
    for _ in range(STEPS):
        level = (low + high) / 2
        low, high = (level, high) if float(variance_C.clamp_max(level).sum()) * positions < HARM else (low, level)
    above_C = variance_C[variance_C > low]
    return positions * float((above_C / max(low, 1e-300)).log2().sum()) / 2 if low > 0 else math.inf
