from __future__ import annotations

import io
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.vision.images import encode_image, is_grey, open_image, preprocess
from isthmus.models.vision.manifest import Preprocessing

NEUTRAL = {"mean": (0.0, 0.0, 0.0), "deviation": (1.0, 1.0, 1.0)}


def file(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "error"), [("jpeg", 12.0), ("png", 0.0), ("webp", 12.0)])
def test_what_is_encoded_is_opened(photo: Image.Image, form: Literal["jpeg", "png", "webp"], error: float) -> None:
    opened = open_image(encode_image(photo, form, quality=90))
    assert opened.mode == "RGB"
    difference = np.asarray(opened).astype(float) - np.asarray(photo)
    assert np.abs(difference).mean() <= error


def test_quality_costs_bytes(photo: Image.Image) -> None:
    assert len(encode_image(photo, "jpeg", quality=20)) < len(encode_image(photo, "jpeg", quality=75))


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("RGBA", "WEBP")]
)
def test_every_usual_mode_becomes_rgb(photo: Image.Image, mode: str, form: str) -> None:
    opened = open_image(file(photo.convert(mode), form))
    assert (opened.mode, opened.size) == ("RGB", photo.size)


def test_transparency_is_left_out(photo: Image.Image) -> None:
    see_through = photo.copy()
    see_through.putalpha(0)
    np.testing.assert_array_equal(np.asarray(open_image(file(see_through, "PNG"))), np.asarray(photo))


def test_grey_of_16_bits_keeps_its_upper_eight() -> None:
    wide_HW = np.arange(0, 1 << 16, 16, dtype=np.uint16).reshape(64, 64)
    opened = np.asarray(open_image(file(Image.fromarray(wide_HW), "PNG")))
    np.testing.assert_array_equal(opened, np.repeat((wide_HW >> 8)[..., None], 3, axis=2))


def test_grey_is_distinguished_from_colour(photo: Image.Image) -> None:
    assert is_grey(photo.convert("L").convert("RGB"))
    assert not is_grey(photo)


def test_preprocessing_without_scaling_is_the_formula(photo: Image.Image) -> None:
    spec = Preprocessing(resize=64, crop=(64, 64), mean=(0.1, 0.2, 0.3), deviation=(0.5, 0.6, 0.7))
    by_hand = (np.asarray(photo) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    got_CHW = preprocess(photo, spec)
    assert (got_CHW.dtype, got_CHW.shape, got_CHW.flags.c_contiguous) == (np.float32, (3, 64, 64), True)
    np.testing.assert_allclose(got_CHW, by_hand.transpose(2, 0, 1), atol=1e-5)


def test_the_crop_is_the_middle() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[1:3, 2:4] = 255
    spec = Preprocessing(resize=4, crop=(2, 2), **NEUTRAL)
    np.testing.assert_array_equal(preprocess(Image.fromarray(pixels), spec), np.ones((3, 2, 2)))


def test_crop_is_height_by_width() -> None:
    spec = Preprocessing(resize=8, crop=(4, 6), **NEUTRAL)
    assert preprocess(Image.new("RGB", (9, 8)), spec).shape == (3, 4, 6)


@given(width=st.integers(1, 90), height=st.integers(1, 90))
def test_scaling_the_crop_alone_equals_cropping_the_scaled_photo(width: int, height: int) -> None:
    pixels = np.random.default_rng(width * 100 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    spec = Preprocessing(resize=24, crop=(20, 22), **NEUTRAL)
    scale = 24 / min(width, height)
    whole = image.resize((max(24, round(width * scale)), max(24, round(height * scale))), Image.Resampling.BILINEAR)
    left, top = (whole.width - 22) // 2, (whole.height - 20) // 2
    wanted = np.asarray(whole.crop((left, top, left + 22, top + 20)), np.float32) / 255
    np.testing.assert_allclose(preprocess(image, spec).transpose(1, 2, 0), wanted, atol=1.01 / 255)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(photo: Image.Image, form: str) -> None:
    with pytest.raises(InvalidInput, match="not a readable JPEG, PNG, WEBP image"):
        open_image(file(photo, form))


def test_a_phone_photo_stands_upright() -> None:
    """Phones store the sensor's picture and a note how to turn it."""
    sideways = Image.fromarray(np.linspace(0, 255, 32 * 16 * 3, dtype=np.uint8).reshape(32, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise to stand upright
    buffer = io.BytesIO()
    sideways.save(buffer, "PNG", exif=exif)
    upright = np.asarray(open_image(buffer.getvalue()))
    np.testing.assert_array_equal(upright, np.rot90(np.asarray(sideways), -1))
