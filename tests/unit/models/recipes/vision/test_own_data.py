from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision import own_data
from isthmus.models.recipes.vision.own_data import PARTS, find, jpeg_bytes, load, normalise, part_of, samples
from isthmus.models.vision.images import preprocess
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


def test_the_same_names_in_many_folders_are_in_all_parts() -> None:
    assert {part_of(Path(f"day{day}/0001.png")) for day in range(50)} == set(PARTS)


@pytest.mark.parametrize("names", [("train", "val"), ("training", "validation", "test"), ("train", "test")])
def test_folders_of_train_and_val_are_parts(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        for label in ("cat", "dog"):
            fill(tmp_path / name / label, 40)
    found = find(tmp_path)
    assert found.classes == ("cat", "dog") and {found.label(path) for path in found.paths} == {0, 1}
    assert found.notes == (f"{', '.join(sorted(names))} are taken for parts of the data, not for classes",)
    by_part = {part: {p.relative_to(tmp_path).parts[0] for p in found.paths if found.part(p) == part} for part in PARTS}
    assert by_part["train"] == {names[0]}
    assert by_part["calibration"] == {names[1]} and by_part["test"] == {names[-1]}


def test_parts_without_classes_have_no_labels(tmp_path: Path) -> None:
    fill(tmp_path / "train", 30)
    fill(tmp_path / "val", 30)
    assert find(tmp_path).classes == () and {find(tmp_path).part(path) for path in find(tmp_path).paths} == set(PARTS)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "tram"):
        fill(tmp_path / name, 1)
    assert find(tmp_path).classes == ("train", "tram")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere" / "dog", 2)
    fill(tmp_path / "photos" / "cat", 2)
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "photos" / "cat" / "again").symlink_to(tmp_path / "photos")
    found = find(tmp_path / "photos")
    assert found.classes == ("cat", "dog") and len(found.paths) == 4


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 2)
    fill(tmp_path / ".thumbnails" / "cat", 1)
    fill(tmp_path / "__MACOSX" / "cat", 1)
    for name in ("._cat0.png", "phone.heic", "scan.TIF", "anim.gif"):
        (tmp_path / "cat" / name).write_bytes(b"not read")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = find(tmp_path)
    assert found.classes == ("cat",) and len(found.paths) == 2
    assert found.notes == (
        "3 images of other formats are left out (.gif, .heic, .tif)",
        "3 hidden files and folders are left out",
        "1 links to images lead nowhere",
    )


def test_a_folder_of_another_format_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "phone.heic").write_bytes(b"not read")
    with pytest.raises(InvalidInput, match=r"holds no image .*; 1 images of other formats are left out \(.heic\)"):
        find(tmp_path)


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
    assert shares == pytest.approx([0.6, 0.25, 0.15], abs=0.03)


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
    np.testing.assert_array_equal(preprocess(samples(part).photos[0](), SPEC), image_3HW)


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
