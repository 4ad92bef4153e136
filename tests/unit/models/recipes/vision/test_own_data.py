from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision import own_data
from isthmus.models.recipes.vision.own_data import PARTS, find, jpeg_bytes, load, normalise, part_of, samples
from isthmus.models.vision.manifest import Preprocessing

SPEC = Preprocessing(resize=8, crop=(8, 8), mean=(0.5, 0.25, 0.0), deviation=(0.5, 0.25, 1.0))


def fill(folder: Path, count: int, shade: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.full((8, 8, 3), (shade + index) % 256, np.uint8)
        Image.fromarray(pixels).save(folder / f"{folder.name}{index}.png")


def test_sub_folders_are_classes_in_order(tmp_path: Path) -> None:
    fill(tmp_path / "dog", 2)
    fill(tmp_path / "cat" / "deeper", 1)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    found = find(tmp_path)
    assert found.classes == ("cat", "dog")
    assert [found.label(path) for path in found.paths] == [0, 1, 1]


def test_images_without_sub_folders_have_no_labels(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    assert find(tmp_path).classes == () and len(find(tmp_path).paths) == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "nowhere", "nowhere is not a folder"),
        (lambda folder: folder, "holds no image"),
        (lambda folder: fill(folder, 1) or fill(folder / "cat", 1) or folder, "holds 1 images beside its sub-folders"),
    ],
    ids=["missing", "empty", "some labelled"],
)
def test_folders_that_say_nothing_are_refused(tmp_path: Path, make: object, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        find(make(tmp_path))  # type: ignore[operator]


def test_an_image_stays_in_its_part_whatever_is_beside_it(tmp_path: Path) -> None:
    names = [Path(f"{index}.png") for index in range(4000)]
    shares = [sum(part_of(name) == part for name in names) / len(names) for part in PARTS]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
    assert part_of(Path("a/photo.png")) == part_of(Path("b/photo.png"))


def test_parts_hold_every_image_once_with_its_class(tmp_path: Path) -> None:
    fill(tmp_path / "a", 100)
    fill(tmp_path / "b", 100, shade=100)
    parts = load(find(tmp_path), SPEC)
    assert sorted(path for part in parts.values() for path in part.paths) == list(find(tmp_path).paths)
    for part in parts.values():
        assert part.labels_N is not None
        for image_3HW, path, label in zip(part.images_N3HW, part.paths, part.labels_N, strict=True):
            assert label == ("a", "b").index(path.parent.name)
            assert (image_3HW == int(path.stem[1:]) + 100 * label).all()


def test_pixels_are_normalised_as_the_device_does(tmp_path: Path) -> None:
    fill(tmp_path, 200, shade=51)
    part = load(find(tmp_path), SPEC)["test"]
    (image_3HW,) = normalise(part.images_N3HW[:1], SPEC)
    value = part.images_N3HW[0, 0, 0, 0] / 255
    np.testing.assert_allclose(image_3HW[:, 0, 0], [(value - 0.5) / 0.5, (value - 0.25) / 0.25, value], rtol=1e-5)
    measured = samples(part, np.zeros(len(part), np.int64), SPEC)
    np.testing.assert_array_equal(measured.images[0], image_3HW)


def test_too_few_images_for_a_part_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, 30)
    with pytest.raises(InvalidInput, match="30 images leave .* part, 20 are needed"):
        load(find(tmp_path), SPEC)


def test_more_than_fits_in_memory_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 3)
    monkeypatch.setattr(own_data, "MAX_BYTES", 3 * 3 * 8 * 8 - 1)
    with pytest.raises(InvalidInput, match="3 images of 8x8 pixels take"):
        load(find(tmp_path), SPEC)


def test_images_that_do_not_open_are_counted_and_the_first_named(tmp_path: Path) -> None:
    fill(tmp_path, 200)
    for name in ("0broken.png", "1broken.jpg"):
        (tmp_path / name).write_bytes(b"no image at all")
    with pytest.raises(InvalidInput, match="2 of 202 images do not open, the first is .*broken"):
        load(find(tmp_path), SPEC)


def test_size_as_jpeg_is_that_of_real_files() -> None:
    images_N3HW = np.zeros((2, 3, 32, 32), np.uint8)
    assert 300 < jpeg_bytes(images_N3HW) < 1000
    images_N3HW[1] = np.random.default_rng(0).integers(0, 256, (3, 32, 32))
    assert jpeg_bytes(images_N3HW) > 800
