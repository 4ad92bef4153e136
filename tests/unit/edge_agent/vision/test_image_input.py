from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.edge_agent.vision import image_input as photos
from isthmus.edge_agent.vision.image_input import as_image
from isthmus.models.errors import InvalidInput


def test_a_photo_is_the_same_however_it_is_given(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    for given in (photo, path.read_bytes(), path, str(path)):
        np.testing.assert_array_equal(np.asarray(as_image(given)), np.asarray(photo))


def test_grey_photos_become_rgb(photo: Image.Image) -> None:
    assert as_image(photo.convert("L")).mode == "RGB"


@pytest.mark.parametrize(("name", "words"), [("none.png", "No such file"), (".", "Is a directory")])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        as_image(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_a_file_over_the_cap_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "MAX_FILE_BYTES", 10)
    (tmp_path / "large.png").write_bytes(bytes(11))
    with pytest.raises(InvalidInput, match="larger than 10 bytes"):
        as_image(tmp_path / "large.png")


def test_a_turned_photo_is_the_same_however_it_is_given(photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    photo.crop((0, 0, 64, 40)).save(path, exif=exif)
    upright = np.asarray(as_image(path))
    assert upright.shape == (64, 40, 3)
    with path.open("rb") as file, Image.open(path) as image:
        for given in (
            path.read_bytes(),
            bytearray(path.read_bytes()),
            file,
            io.BytesIO(path.read_bytes()),
            image,
            upright,
        ):
            np.testing.assert_array_equal(np.asarray(as_image(given)), upright)
        assert image.size == (64, 40)  # the caller's image is left as it is


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_every_mode_is_the_same_as_file_and_as_pil_image(photo: Image.Image, mode: str) -> None:
    grey_HW = np.asarray(photo.convert("L")).astype(np.uint16) << 4
    image = Image.fromarray(grey_HW) if mode == "I;16" else photo.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    np.testing.assert_array_equal(np.asarray(as_image(image)), np.asarray(as_image(buffer.getvalue())))
    if mode in ("L", "RGB", "I;16"):
        np.testing.assert_array_equal(np.asarray(as_image(np.asarray(image))), np.asarray(as_image(image)))


def test_arrays_need_not_be_contiguous(photo: Image.Image) -> None:
    pixels_HW3 = np.asarray(photo)[::2, ::-1]
    np.testing.assert_array_equal(np.asarray(as_image(pixels_HW3)), pixels_HW3)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((3, 8, 8), "uint8"), ((8, 8, 3), "float32"), ((8, 8, 4), "uint8"), ((0, 8, 3), "uint8"), ((8,), "uint8")],
)
def test_other_arrays_are_described(shape: tuple[int, ...], kind: str) -> None:
    with pytest.raises(InvalidInput, match=f"the array is {kind} of shape .*expected RGB: uint8"):
        as_image(np.zeros(shape, kind))


@pytest.mark.parametrize("given", [None, 7, [1, 2], object()])
def test_other_types_are_named(given: object) -> None:
    with pytest.raises(InvalidInput, match=f"a photo is a path.*got {type(given).__name__}"):
        as_image(given)  # type: ignore[arg-type]


def test_files_that_give_no_bytes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="open it in binary mode"):
        as_image(io.StringIO("text"))  # type: ignore[arg-type]
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(InvalidInput, match="closed file"):
        as_image(closed)
    with pytest.raises(InvalidInput, match="is not a path"):
        as_image("a\0b")


def test_a_truncated_pil_image_is_the_caller_s_error(photo: Image.Image) -> None:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    image = Image.open(io.BytesIO(buffer.getvalue()[:2_000]))
    with pytest.raises(InvalidInput, match="cannot be read"):
        as_image(image)
    with pytest.raises(InvalidInput, match="floating-point"):
        as_image(Image.new("F", (4, 4)))
