from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isthmus.models.recipes.vision.augment import random_affine, random_contrast, random_dihedral, random_mirror

Augment = Callable[[Tensor, torch.Generator], Tensor]
ALL = pytest.mark.parametrize("augment", [random_dihedral, random_mirror, random_affine, random_contrast])


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(5))


def seeded(augment: Augment, seed: int) -> Tensor:
    return augment(images(), torch.Generator().manual_seed(seed))


@ALL
def test_shape_and_range_stay(augment: Augment) -> None:
    got_BCHW = seeded(augment, 0)
    assert got_BCHW.shape == images().shape
    assert got_BCHW.min() >= 0
    assert got_BCHW.max() <= 1 + 1e-6


@ALL
def test_the_generator_decides_everything(augment: Augment) -> None:
    first = seeded(augment, 3)
    torch.rand(3)
    assert torch.equal(first, seeded(augment, 3))
    assert not torch.equal(first, seeded(augment, 4))


@ALL
def test_the_photographs_themselves_are_not_touched(augment: Augment) -> None:
    given = images()
    augment(given, torch.Generator().manual_seed(0))
    assert torch.equal(given, images())


def test_all_eight_views_of_a_square_appear() -> None:
    given = images(1).expand(200, -1, -1, -1)
    views = {tuple(view.ravel().tolist()) for view in random_dihedral(given, torch.Generator().manual_seed(0))}
    turns = [torch.rot90(images(1)[0], k, (1, 2)) for k in range(4)]
    assert views == {tuple(x.ravel().tolist()) for turn in turns for x in (turn, turn.flip(2))}


def test_a_plain_image_stays_plain_when_moved() -> None:
    moved = random_affine(torch.full((8, 1, 9, 9), 0.5), torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, torch.full((8, 1, 9, 9), 0.5))


def test_moves_are_small() -> None:
    """A bright spot in the middle stays within the middle third."""
    spot = torch.zeros(64, 1, 30, 30)
    spot[:, :, 14:16, 14:16] = 1
    moved = random_affine(spot, torch.Generator().manual_seed(0))
    assert moved[:, :, 10:20, 10:20].sum() == pytest.approx(moved.sum().item(), rel=1e-5)


def test_brightness_moves_by_a_fifth_at_most() -> None:
    plain = torch.full((500, 1, 2, 2), 0.5)
    means = random_contrast(plain, torch.Generator().manual_seed(0)).mean((1, 2, 3))
    assert 0.4 - 1e-6 <= means.min() < 0.42
    assert 0.58 < means.max() <= 0.6 + 1e-6


def test_half_of_the_images_are_mirrored_whole() -> None:
    before, after = images(200), random_mirror(images(200), torch.Generator().manual_seed(0))
    same, turned = ((after == view).all(dim=(1, 2, 3)) for view in (before, before.flip(3)))
    assert (same | turned).all() and 70 < int(turned.sum()) < 130
