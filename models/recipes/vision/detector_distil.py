"""A detector's bottleneck distilled from the detector itself: its maps, its scores and its boxes; no labels.

    maps (frozen) -> encoder -> round -> decoder -> heads (frozen)  <- the detector's own scores and boxes, bits

Cells count by the score of their best class, squared, so that what is no object to the detector costs no bits. Scores
are compared by cross-entropy, distributions over distances by theirs (Li et al., "Generalized Focal Loss", NeurIPS
2020), boxes by their intersection over union.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.recipes.vision.components import normalised
from isthmus.models.recipes.vision.detector_tap import MapEncoder, pack, unpack
from isthmus.models.recipes.vision.distil import relative_distance
from isthmus.models.recipes.vision.nanodet import Heads, candidates
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.recipes.vision.views import BATCH
from isthmus.models.vision.split import DenseDecoder

BOXES, DISTANCES, FEATURES = 2.0, 0.25, 0.2  # weights beside the scores' cross-entropy
LEAST_OBJECTS = 1.0  # of a batch, whose loss is divided by their number


@dataclass(frozen=True)
class MapBatch:
    """The neck's maps of a batch, and the factor of the price of bytes."""

    maps: list[Tensor]
    ramp: float = 1.0


class DetectorDistillation(nn.Module):
    """Encoder, rates and decoder in training; the heads are the detector's and stay as they are."""

    def __init__(self, encoder: MapEncoder, rates: Rates, decoder: DenseDecoder, heads: Heads) -> None:
        super().__init__()
        self.encoder, self.rates, self.decoder = encoder, rates, decoder
        self.heads = heads.eval().requires_grad_(False)

    def loss(self, batch: MapBatch) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of one batch, whose inputs take the rates in turn."""
        packed_BCHW = pack(batch.maps)
        rate_B = torch.arange(len(packed_BCHW)) % len(self.rates.per_kilobyte)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                teacher = self.heads(batch.maps)
            latent_BCHW = self.encoder(packed_BCHW)
        bits_B, latent_BCHW = self.rates(latent_BCHW, rate_B)
        with torch.autocast("cpu", torch.bfloat16):
            decoded_BCHW = self.decoder(latent_BCHW, rate_B)
            got = self.heads(unpack(decoded_BCHW))
        task, figures = detection_loss(teacher, got)
        distance = relative_distance(packed_BCHW, decoded_BCHW)
        price, bytes_each = self.rates.price(bits_B, rate_B)
        loss = task + FEATURES * distance + batch.ramp * price
        return loss, {"task": task.item(), **figures, "features": distance.item(), **bytes_each}


def detection_loss(teacher: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Scores, distributions over distances and boxes against the detector's own, by object."""
    (logits_BNC, distances_BN4D), (own_logits_BNC, own_distances_BN4D) = (
        (logits.float(), distances.float()) for logits, distances in (teacher, got)
    )
    wanted_BNC, own_BNC = logits_BNC.sigmoid(), own_logits_BNC.sigmoid()
    object_BN = wanted_BNC.amax(2).square()
    weight_BN = torch.maximum(object_BN, own_BNC.detach().amax(2).square())
    objects = object_BN.sum().clamp_min(LEAST_OBJECTS)
    excess_BNC = F.binary_cross_entropy_with_logits(own_logits_BNC, wanted_BNC, reduction="none")
    excess_BNC = excess_BNC - F.binary_cross_entropy_with_logits(logits_BNC, wanted_BNC, reduction="none")
    scores = (weight_BN * excess_BNC.sum(2)).sum() / objects
    wanted_BN4D = distances_BN4D.log_softmax(3)
    divergence_BN4 = F.kl_div(own_distances_BN4D.log_softmax(3), wanted_BN4D, reduction="none", log_target=True).sum(3)
    distances = (object_BN * divergence_BN4.sum(2)).sum() / objects
    overlap_BN = paired_iou(
        candidates(logits_BNC, distances_BN4D)[0], candidates(own_logits_BNC, own_distances_BN4D)[0]
    )
    boxes = (object_BN * (1 - overlap_BN)).sum() / objects
    figures = {"scores": scores.item(), "distances": distances.item(), "boxes": boxes.item()}
    return scores + DISTANCES * distances + BOXES * boxes, figures


def paired_iou(a_BN4: Tensor, b_BN4: Tensor) -> Tensor:
    """Intersection over union of boxes of the same cell."""
    corner_BN2 = torch.minimum(a_BN4[..., 2:], b_BN4[..., 2:]) - torch.maximum(a_BN4[..., :2], b_BN4[..., :2])
    common_BN = corner_BN2.clamp_min(0).prod(2)
    areas_BN = [(box[..., 2:] - box[..., :2]).clamp_min(0).prod(2) for box in (a_BN4, b_BN4)]
    return common_BN / (areas_BN[0] + areas_BN[1] - common_BN).clamp_min(1e-6)


@torch.enable_grad()
def information(packed_NCHW: Tensor, heads: Heads) -> Tensor:
    """Fisher information of sampled scores and distances in the packed maps, (C, C), as `components.information`."""
    total_CC = torch.zeros(packed_NCHW.shape[1], packed_NCHW.shape[1])
    generator = torch.Generator().manual_seed(0)
    for chunk_BCHW in torch.split(packed_NCHW, BATCH):
        inputs_BCHW = chunk_BCHW.detach().requires_grad_(True)
        logits_BNC, distances_BN4D = heads(unpack(inputs_BCHW))
        chance_BNC = logits_BNC.detach().sigmoid()
        weight_BN = chance_BNC.amax(2)
        drawn_BNC = torch.bernoulli(chance_BNC, generator=generator)
        likelihood = -F.binary_cross_entropy_with_logits(logits_BNC, drawn_BNC, reduction="none").sum(2)
        bins = torch.multinomial(distances_BN4D.detach().softmax(3).flatten(0, 2), 1, generator=generator)
        drawn_BN4 = distances_BN4D.log_softmax(3).flatten(0, 2).gather(1, bins).unflatten(0, distances_BN4D.shape[:3])
        likelihood = likelihood + DISTANCES * drawn_BN4.sum((2, 3))
        (gradient_BCHW,) = torch.autograd.grad((weight_BN * likelihood).sum(), inputs_BCHW)
        gradient_CN = gradient_BCHW.transpose(0, 1).flatten(1)
        total_CC += gradient_CN @ gradient_CN.T
    return normalised(total_CC)
