from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision.own_checks import check_order, find_warnings, whole_images
from isthmus.models.recipes.vision.own_data import Images
from tests.unit.models.recipes.vision.own_nets import SIDE, SPEC, factory

LABELS = np.arange(200) % 2


def logits(right: int, sure: float) -> Tensor:
    """Of 200 images, half of each class: the first `right` answers are right, each with a confidence."""
    answers_N = torch.from_numpy(np.where(np.arange(200) < right, LABELS, 1 - LABELS))
    return torch.where(torch.eye(2)[answers_N] > 0, float(np.log(sure / (1 - sure))), 0.0)


@pytest.mark.parametrize(
    ("right", "sure", "labels_N", "words"),
    [
        (200, 0.999, LABELS, "right on 100.0% .* if it was trained on these images"),
        (180, 0.7, LABELS, "right on 90.0% of the images, and 70.0% sure .* if it was trained"),
        (200, 0.999, None, "99.9% sure of its answers: if it was trained"),
        (105, 0.6, LABELS, "right on 52% of the images, and always .* on 50%: is it trained"),
        (180, 0.92, LABELS, None),
        (200, 0.9, None, None),
    ],
)
def test_a_model_that_has_seen_the_images_or_is_not_trained_is_warned_of(
    right: int, sure: float, labels_N: NDArray[np.int64] | None, words: str | None
) -> None:
    found = find_warnings(logits(right, sure), labels_N)
    assert len(found) == (words is not None)
    if words is not None:
        assert re.search(words, found[0])


def test_a_model_that_always_answers_the_same_is_warned_of() -> None:
    assert "the same class" in find_warnings(torch.tensor([[0.0, 1.0]]).expand(50, 2), None)[0]


def test_classes_in_another_order_are_found_before_training() -> None:
    labels_N = np.repeat([0, 1, 2], 10)
    check_order(labels_N, labels_N, ("ant", "bee", "cow"))
    check_order(np.zeros(30, np.int64), labels_N, ("ant", "bee", "cow"))  # a bad model, whatever its order
    with pytest.raises(InvalidInput, match=r"right on 0% .* on 100% if its classes were bee, cow, ant"):
        check_order(np.repeat([2, 0, 1], 10), labels_N, ("ant", "bee", "cow"))


def test_whole_images_are_compared_in_every_format() -> None:
    images_N3HW = np.random.default_rng(0).integers(0, 256, (4, 3, SIDE, SIDE), dtype=np.uint8)
    found = whole_images(factory(), Images(images_N3HW, None), SPEC)
    assert [each.name for each in found] == ["JPEG of quality 75", "WebP of quality 75", "AVIF of quality 60"]
    assert all(100 < each.mean_bytes < 5000 and 0 <= each.agreement <= 1 for each in found)


def test_a_file_gives_what_the_network_would_have_seen() -> None:
    class Mean(nn.Module):
        def forward(self, x_B3HW: Tensor) -> Tensor:
            return x_B3HW.mean((2, 3))

    grey = np.zeros((1, 3, SIDE, SIDE), np.uint8)
    grey[:, 1] = 200
    assert [each.agreement for each in whole_images(Mean(), Images(grey, None), SPEC)] == [1.0, 1.0, 1.0]
