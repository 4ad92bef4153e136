from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision import photos_data
from isthmus.models.recipes.vision.photos_data import crops, draw, extract, find, labelled, paste
from isthmus.models.recipes.vision.views import VIEWS, Views


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8), mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photographs, one of them in three sizes, an object, and what is neither."""
    (tmp_path / "wallpaper").mkdir()
    for size in ((1280, 1024), (640, 480), (1080, 1920)):
        picture(*size).save(tmp_path / "wallpaper" / f"{size[0]}x{size[1]}.jpg")
    picture(300, 240).save(tmp_path / "small.png")
    picture(150, 120, "RGBA").save(tmp_path / "object.png")
    picture(90, 300).save(tmp_path / "narrow.jpg")
    picture(60, 60, "RGBA").save(tmp_path / "icon.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8no photo")
    (tmp_path / "photo.txt").write_text("not an image")
    return tmp_path


def test_photographs_come_in_their_largest_size_and_large_ones_more_often(folder: Path) -> None:
    found = find(folder)
    large = folder / "wallpaper" / "1080x1920.jpg"
    assert sorted(found.photos) == sorted([folder / "small.png", *[large] * photos_data.LARGE_ROWS])
    assert found.objects == (folder / "object.png",)
    assert found.rows == (*found.photos, *found.objects)


def test_more_photographs_can_be_named(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    picture(210, 210).save(other / "a.jpg")
    assert other / "a.jpg" in find(folder / "wallpaper", [other / "a.jpg"]).photos


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no photograph of at least 200 pixels"):
        find(tmp_path)


@pytest.fixture
def drawn(folder: Path, tmp_path: Path) -> Views:
    return draw(tmp_path / "views", find(folder), 64, seed=1)


def test_every_source_has_its_row_in_every_view(drawn: Views, folder: Path) -> None:
    rows = find(folder).rows
    assert len(drawn.passes) == VIEWS
    for view in drawn.passes:
        assert view["images"].shape == (len(rows), 3, 64, 64)
        assert view["images"].std() > 10
    assert len({view["images"].tobytes() for view in drawn.passes}) == VIEWS


def test_the_seed_decides_the_views(drawn: Views, folder: Path, tmp_path: Path) -> None:
    again, other = (draw(tmp_path / f"views{seed}", find(folder), 64, seed) for seed in (1, 2))
    np.testing.assert_array_equal(again.passes[3]["images"], drawn.passes[3]["images"])
    assert (other.passes[3]["images"] != drawn.passes[3]["images"]).any()


def test_crops_keep_away_from_an_empty_sky() -> None:
    pixels_HW3 = np.full((1200, 1200, 3), 200, np.uint8)
    pixels_HW3[600:] = np.random.default_rng(0).integers(0, 256, (600, 1200, 3))
    found = crops(Image.fromarray(pixels_HW3), 32, np.random.default_rng(0))
    assert found.shape == (VIEWS, 32, 32, 3)
    assert all(crop.std() >= photos_data.LEAST_CONTRAST for crop in found)


def test_an_empty_photograph_gives_its_crops_all_the_same() -> None:
    assert crops(Image.new("RGB", (300, 300), "grey"), 32, np.random.default_rng(0)).shape == (VIEWS, 32, 32, 3)


def test_an_object_covers_some_of_its_background() -> None:
    below = np.zeros((64, 64, 3), np.uint8)
    thing = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    covered = (paste(thing, below, np.random.default_rng(0))[..., 0] == 255).mean()
    assert 0.05 < covered < 0.7 and not below.any()


def test_pictures_in_a_resource_file_are_found(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(210, 220).save(buffer, "WEBP", lossless=True)
    (tmp_path / "animals.rcc").write_bytes(b"qres" + buffer.getvalue() + b"\0names\0" + buffer.getvalue() + b"end")
    extract(tmp_path / "animals.rcc")
    assert sorted(path.name for path in tmp_path.glob("*.webp")) == ["animals0.webp", "animals1.webp"]
    with Image.open(tmp_path / "animals1.webp") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(210, 220)))


def test_labelled_photographs_are_in_one_part_each(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index * 7:03}_thing.JPEG").write_bytes(b"")
    (tmp_path / "no_class.jpg").write_bytes(b"")
    parts = {part: labelled(tmp_path, part) for part in ("test", "calibration", "train")}
    assert {part: len(found.paths) for part, found in parts.items()} == {"test": 12, "calibration": 4, "train": 4}
    assert sorted(label for found in parts.values() for label in found.labels_N) == [7 * index for index in range(20)]
    assert parts["train"].paths[0].name == "028_thing.JPEG" and parts["train"].labels_N[0] == 28


def test_a_folder_without_labelled_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="012_house_finch.jpg"):
        labelled(tmp_path, "test")
