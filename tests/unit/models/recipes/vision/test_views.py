from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.models.recipes.vision.views import BATCH, VIEWS, Views, draw_views, extend, make_views

COUNT = 2 * BATCH + 3


@pytest.fixture
def images_NHW() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 12, 12), dtype=np.uint8)


def means(grey_BHW: Tensor) -> Mapping[str, Tensor]:
    return {"mean": grey_BHW.mean((1, 2)), "rows": grey_BHW.mean(2)}


@pytest.fixture
def views(tmp_path: Path, images_NHW: np.ndarray) -> Views:
    make_views(tmp_path, images_NHW, seed=0)
    return extend(tmp_path, "teacher", means)


def test_every_view_is_another_look_at_the_photograph(views: Views, images_NHW: np.ndarray) -> None:
    assert (len(views), len(views.passes)) == (COUNT, VIEWS)
    looks = [view["images"] for view in views.passes]
    assert all(look.shape == images_NHW.shape and look.dtype == np.uint8 for look in looks)
    assert len({look.tobytes() for look in looks}) == VIEWS


def test_what_is_computed_belongs_to_its_own_view(views: Views) -> None:
    for view in views.passes:
        wanted = np.asarray(view["images"], np.float32).mean((1, 2)) / 255
        np.testing.assert_allclose(view["mean"], wanted, atol=1e-3)
        assert view["rows"].dtype == np.float16


def test_an_epoch_shows_whole_batches_of_different_photographs(views: Views) -> None:
    seen = []
    for indices, arrays in views.batches(torch.Generator().manual_seed(1)):
        assert arrays["images"].shape == (BATCH, 12, 12)
        assert arrays["images"].max() <= 1
        np.testing.assert_allclose(arrays["images"].mean((1, 2)), arrays["mean"], atol=1e-3)
        seen += indices.tolist()
    assert len(seen) == len(set(seen)) == COUNT // BATCH * BATCH


def test_an_epoch_mixes_the_views(views: Views) -> None:
    indices, arrays = next(views.batches(torch.Generator().manual_seed(1), ["images"]))
    taken = {
        view
        for index, image in zip(indices, arrays["images"], strict=True)
        for view in range(VIEWS)
        if np.allclose(views.passes[view]["images"][index] / 255, image, atol=1e-4)
    }
    assert len(taken) > 2
    assert set(arrays) == {"images"}


def test_the_same_seed_gives_the_same_epoch(views: Views) -> None:
    (first, _), (again, _) = (next(views.batches(torch.Generator().manual_seed(5))) for _ in range(2))
    assert (first == again).all()


def test_finished_views_are_not_computed_again(tmp_path: Path, views: Views) -> None:
    def fails(grey_BHW: Tensor) -> Mapping[str, Tensor]:
        raise AssertionError("it was there already")

    assert set(extend(tmp_path, "teacher", fails).passes[0]) == {"images", "mean", "rows"}


def test_an_interrupted_stage_goes_on_and_is_not_offered_half_done(tmp_path: Path, images_NHW: np.ndarray) -> None:
    make_views(tmp_path, images_NHW, seed=0)
    calls = 0

    def breaks(grey_BHW: Tensor) -> Mapping[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the second view
            raise KeyboardInterrupt
        return means(grey_BHW)

    with pytest.raises(KeyboardInterrupt):
        extend(tmp_path, "teacher", breaks)
    assert set(make_views(tmp_path, images_NHW, seed=0).passes[0]) == {"images"}
    whole = extend(tmp_path, "teacher", means)
    np.testing.assert_allclose(
        whole.passes[1]["mean"], np.asarray(whole.passes[1]["images"], np.float32).mean((1, 2)) / 255, atol=1e-3
    )


def test_views_drawn_row_by_row_are_kept(tmp_path: Path) -> None:
    rows = [
        np.full((VIEWS, 3, 2, 2), row, np.uint8) + np.arange(VIEWS, dtype=np.uint8)[:, None, None, None]
        for row in (0, 50)
    ]
    drawn = draw_views(tmp_path, 2, (3, 2, 2), rows)
    for view, arrays in enumerate(drawn.passes):
        assert arrays["images"].tolist() == [np.full((3, 2, 2), row + view).tolist() for row in (0, 50)]
    assert len(draw_views(tmp_path, 2, (3, 2, 2), [])) == 2, "drawn before, they are opened"
