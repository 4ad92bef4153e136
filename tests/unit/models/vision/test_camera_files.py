from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image, features

from isthmus.models.errors import InvalidInput
from isthmus.models.vision.camera_files import open_photo
from tests.camera_file import camera_file

LOSSLESS = ["BMP", "TIFF", "PNG", "WEBP"]


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_formats_give_the_same_pixels(photo: Image.Image, form: str) -> None:
    opened = open_photo(camera_file(photo, form, **({"lossless": True} if form == "WEBP" else {})))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(photo.convert("RGB")))


@pytest.mark.parametrize("form", ["HEIC", "AVIF", "GIF", "JPEG"])
def test_lossy_formats_give_nearly_the_same_pixels(photo: Image.Image, form: str) -> None:
    opened = open_photo(camera_file(photo, form))
    assert (opened.mode, opened.size) == ("RGB", photo.size)
    error = np.asarray(opened, np.float32) - np.asarray(photo.convert("RGB"), np.float32)
    assert np.abs(error).mean() < 20


def test_the_first_frame_of_a_gif_and_the_first_page_of_a_tiff_are_read() -> None:
    red, blue = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 255))
    for form in ("GIF", "TIFF"):
        opened = open_photo(camera_file(red, form, save_all=True, append_images=[blue]))
        assert (opened.size, opened.getpixel((0, 0))) == ((20, 10), (255, 0, 0))


@pytest.mark.parametrize("form", ["HEIC", "AVIF", "TIFF"])
def test_photos_stand_upright(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = Image.new("RGB", (64, 32))
    assert open_photo(camera_file(sideways, form, exif=exif.tobytes())).size == (32, 64)


def test_what_reads_a_format_may_be_missing(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    heic, avif = camera_file(photo, "HEIC"), camera_file(photo, "AVIF")
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)
    with pytest.raises(InvalidInput, match=r"pip install 'isthmus\[heif\]'"):
        open_photo(heic)
    monkeypatch.setattr(features, "check", lambda _: False)
    with pytest.raises(InvalidInput, match=r"from version 11.3 on"):
        open_photo(avif)
