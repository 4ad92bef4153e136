from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision import objects_data
from isthmus.models.recipes.vision.nanodet import SIDE


def write(folder: Path, count: int, size: tuple[int, int] = (220, 110)) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    for index in range(count):
        Image.fromarray(pixels).save(folder / f"{index:02}.png")


def test_every_fifth_photograph_is_held_out(tmp_path: Path) -> None:
    write(tmp_path, 11)
    (tmp_path / "notes.jpg").write_text("no image")
    trained, held_out = objects_data.photographs(tmp_path)
    assert [path.name for path in held_out] == ["00.png", "05.png", "10.png"]
    assert len(trained) == 8


def test_too_few_photographs_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 4)
    with pytest.raises(InvalidInput, match="holds 4 photographs, expected 5 or more"):
        objects_data.photographs(tmp_path)


def test_a_photograph_is_scaled_and_padded_to_the_square() -> None:
    image = objects_data.scaled(Image.new("RGB", (200, 100), (255, 0, 0)))
    assert image.size == (SIDE, SIDE // 2)
    pixels_HW3 = objects_data.padded(image)
    assert pixels_HW3.shape == (SIDE, SIDE, 3)
    assert pixels_HW3[0, 0].tolist() == list(objects_data.PADDING)
    assert pixels_HW3[SIDE // 2, 0].tolist() == [255, 0, 0]


def test_views_are_the_whole_photograph_and_parts_of_it(tmp_path: Path) -> None:
    write(tmp_path, 2)
    paths = sorted(tmp_path.glob("*.png"))
    views = objects_data.draw(tmp_path / "views", paths, seed=0)
    assert len(views.passes) == objects_data.VIEWS
    assert len(views) == 2
    whole = objects_data.padded(objects_data.opened(paths[0])).transpose(2, 0, 1)
    assert any(np.array_equal(views.passes[0]["images"][0], each) for each in (whole, whole[..., ::-1]))
