"""What a user should know: warnings about the model or its images before training, and what whole images would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import features
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision.own_data import Images, normalise, recoded
from isthmus.models.recipes.vision.views import BATCH
from isthmus.models.vision.images import FileFormat
from isthmus.models.vision.manifest import Preprocessing

ORDER_MARGIN = 0.3  # of the images: a larger gain in accuracy by another order of classes is no accident
SEEN_RIGHT, SEEN_MARGIN = 0.99, 0.05  # accuracy on training images; above what the model's own confidence says
CHANCE_DEVIATIONS = 2.0  # of accuracy above chance, less than which may be chance
WHOLE: tuple[tuple[FileFormat, int], ...] = (("jpeg", 75), ("webp", 75), ("avif", 60))
WHOLE_IMAGES = 256  # of which they are measured


@dataclass(frozen=True)
class WholeImage:
    """Images sent as files: the format, their mean size, and how often the model answers as to the originals."""

    name: str
    mean_bytes: float
    agreement: float


def logits_of(model: nn.Module, images_N3HW: NDArray[np.uint8], spec: Preprocessing) -> Tensor:
    """The model's logits, (N, classes)."""
    chunks = (images_N3HW[start : start + BATCH] for start in range(0, len(images_N3HW), BATCH))
    with torch.inference_mode():
        return torch.cat([model(torch.from_numpy(normalise(chunk_B3HW, spec))) for chunk_B3HW in chunks])


def find_warnings(logits_NK: Tensor, labels_N: NDArray[np.int64] | None) -> list[str]:
    """Warnings about a model: that it seems untrained, or that it seems to have been trained on these images."""
    confidence_N, answers_N = (each.numpy() for each in logits_NK.softmax(1).max(1))
    count, classes = logits_NK.shape
    sure = float(confidence_N.mean())
    if labels_N is None:
        if np.bincount(answers_N).max() == count and classes > 1:
            return [f"the model gives all {count} calibration images the same class: is it trained, is --mean right?"]
        if sure > SEEN_RIGHT:
            return [seen(f"the model is {sure:.1%} sure of its answers")]
        return []
    right = float((answers_N == labels_N).mean())
    chance = float(np.bincount(labels_N, minlength=classes).max() / count)
    if right <= chance + CHANCE_DEVIATIONS * (chance * (1 - chance) / count) ** 0.5:
        return [
            f"the model is right on {right:.0%} of the images, and always answering the most frequent class would be on"
            f" {chance:.0%}: is it trained, are --mean and --deviation right?"
        ]
    if right >= SEEN_RIGHT or right > sure + SEEN_MARGIN:
        return [seen(f"the model is right on {right:.1%} of the images, and {sure:.1%} sure of its answers")]
    return []


def seen(why: str) -> str:
    """The warning of images that the model may have been trained on."""
    return (
        f"{why}: if it was trained on these images, scores and thresholds hold for them alone;"
        " give images that it has not seen, or train/ and val/ as it was trained"
    )


def check_order(answers_N: NDArray[np.int64], labels_N: NDArray[np.int64], names: Sequence[str]) -> None:
    """Raise InvalidInput when another order of the classes would give a much higher accuracy."""
    counts_KK = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts_KK, (answers_N, labels_N), 1)
    answered, meant = linear_sum_assignment(counts_KK, maximize=True)
    right, best = counts_KK.trace() / len(labels_N), counts_KK[answered, meant].sum() / len(labels_N)
    if best - right > ORDER_MARGIN:
        order = ", ".join(names[index] for index in meant)[:200]
        raise InvalidInput(
            f"the model is right on {right:.0%} of the labelled images, and would be on {best:.0%} if its classes"
            f" were {order}: classes are sub-folders in alphabetical order, so name them in"
            " the order of the model's classes (01-cat, 02-dog, ...)"
        )


def whole_images(model: nn.Module, part: Images, spec: Preprocessing) -> list[WholeImage]:
    """What sending whole images costs and gives: JPEG, WebP, and AVIF where Pillow has it."""
    images_N3HW, compared = part.images_N3HW[:WHOLE_IMAGES], []
    answers_N = logits_of(model, images_N3HW, spec).argmax(1)
    for form, quality in WHOLE:
        if form == "avif" and not features.check("avif"):
            continue
        files, decoded = zip(*(recoded(image_3HW, form, quality) for image_3HW in images_N3HW), strict=True)
        agreement_N = logits_of(model, np.stack(decoded), spec).argmax(1) == answers_N
        name = f"{form.upper().replace('WEBP', 'WebP')} of quality {quality}"
        sizes = [len(file) for file in files]
        compared.append(WholeImage(name, float(np.mean(sizes)), float(agreement_N.float().mean())))
    return compared
