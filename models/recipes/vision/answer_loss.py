"""How far an answer is from the network's own, by kind, and which changes of it would show. Nothing here takes labels.

detect: scores by cross-entropy, each candidate by the square of its best score, so that what is nothing to the detector
costs no bits; boxes by their intersection over union (as Li et al., "Generalized Focal Loss", NeurIPS 2020, weigh
them). segment: the classes of pixels by cross-entropy. embed: one less the cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.models.messages import TaskKind

Outputs = Sequence[Tensor]  # of a network for a batch, as `capturing` names them

BOXES = 2.0  # weight beside the scores' cross-entropy
LEAST_OBJECTS = 1.0  # of a batch, whose loss is divided by their number
LEAST_SCORE = 1e-4  # and its distance from 1, of which a logarithm is taken
BOX_NOISE = 0.05  # of a box's side: a change of its corners that shows


def outputs_of(found: Tensor | Outputs) -> Outputs:
    """The outputs of a module as a sequence."""
    return (found,) if isinstance(found, Tensor) else tuple(found)


def answer_loss(kind: TaskKind, teacher: Outputs, student: Outputs) -> tuple[Tensor, dict[str, float]]:
    """The loss of an answer against the teacher's, 0 where they are the same, and its parts."""
    teacher, student = ([each.float() for each in outputs] for outputs in (teacher, student))
    if kind == "detect":
        return detection_loss((teacher[0], teacher[1]), (student[0], student[1]))
    if kind == "segment":
        wanted_BKHW = teacher[0].log_softmax(1)
        loss = F.kl_div(student[0].log_softmax(1), wanted_BKHW, reduction="none", log_target=True).sum(1).mean()
    else:
        loss = 1 - F.cosine_similarity(student[0], teacher[0]).mean()
    return loss, {}


def detection_loss(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Scores and boxes against the detector's own, by object."""
    (boxes_BN4, wanted_BNC), (own_boxes_BN4, own_BNC) = teacher, student
    wanted_BNC, own_BNC = clamped(wanted_BNC), clamped(own_BNC)
    object_BN = wanted_BNC.amax(2).square()
    weight_BN = torch.maximum(object_BN, own_BNC.detach().amax(2).square())
    objects = object_BN.sum().clamp_min(LEAST_OBJECTS)
    excess_BNC = cross_entropy(own_BNC, wanted_BNC) - cross_entropy(wanted_BNC, wanted_BNC)
    scores = (weight_BN * excess_BNC.sum(2)).sum() / objects
    boxes = (object_BN * (1 - paired_iou(boxes_BN4, own_boxes_BN4))).sum() / objects
    return scores + BOXES * boxes, {"scores": scores.item(), "boxes": boxes.item()}


def clamped(scores: Tensor) -> Tensor:
    """Probabilities whose logarithm is finite."""
    return scores.clamp(LEAST_SCORE, 1 - LEAST_SCORE)


def cross_entropy(chance: Tensor, target: Tensor) -> Tensor:
    """Of each probability; both lie inside (0, 1)."""
    return -(target * chance.log() + (1 - target) * (1 - chance).log())


def paired_iou(a_BN4: Tensor, b_BN4: Tensor) -> Tensor:
    """Intersection over union of boxes of the same candidate."""
    corner_BN2 = torch.minimum(a_BN4[..., 2:], b_BN4[..., 2:]) - torch.maximum(a_BN4[..., :2], b_BN4[..., :2])
    common_BN = corner_BN2.clamp_min(0).prod(2)
    areas_BN = [(box[..., 2:] - box[..., :2]).clamp_min(0).prod(2) for box in (a_BN4, b_BN4)]
    return common_BN / (areas_BN[0] + areas_BN[1] - common_BN).clamp_min(1e-6)


def sampled_likelihood(kind: TaskKind, outputs: Outputs, generator: torch.Generator) -> Tensor:
    """The log-likelihood of an answer drawn from the outputs, summed: its gradient's square is Fisher's information."""
    if kind == "detect":
        return detection_likelihood(outputs[0], outputs[1], generator)
    if kind == "embed":
        unit_BD = F.normalize(outputs[0], dim=1)
        return (unit_BD * torch.randn(unit_BD.shape, generator=generator)).sum()
    logits_NK = outputs[0].movedim(1, -1).flatten(0, -2)
    drawn_N1 = torch.multinomial(logits_NK.detach().softmax(1), 1, generator=generator)
    return logits_NK.log_softmax(1).gather(1, drawn_N1).sum()


def detection_likelihood(boxes_BN4: Tensor, scores_BNC: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn scores, and corners moved by BOX_NOISE, of each candidate by its best score."""
    chance_BNC = clamped(scores_BNC)
    weight_BN = scores_BNC.detach().amax(2)
    drawn_BNC = torch.bernoulli(chance_BNC.detach(), generator=generator)
    likelihood_BN = -cross_entropy(chance_BNC, drawn_BNC).sum(2)
    fixed_BN4 = boxes_BN4.detach()
    side_BN1 = (fixed_BN4[..., 2:] - fixed_BN4[..., :2]).clamp_min(1).mean(2, keepdim=True)
    moved_BN4 = torch.randn(boxes_BN4.shape, generator=generator)
    likelihood_BN = likelihood_BN + (boxes_BN4 * moved_BN4 / (BOX_NOISE * side_BN1)).sum(2)
    return (weight_BN * likelihood_BN).sum()
