from __future__ import annotations

import base64
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isthmus.models.errors import InvalidInput, Overloaded
from isthmus.models.vision import images
from isthmus.models.vision.images import encode_image, is_grey, open_image, preprocess
from isthmus.models.vision.manifest import Preprocessing

SAMPLES = Path(__file__).parents[4] / "docs/samples"
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


def test_transparency_is_composited_on_white(photo: Image.Image) -> None:
    see_through = photo.copy()
    alpha_HW = np.full((64, 64), 255, np.uint8)
    alpha_HW[:32] = 0
    see_through.putalpha(Image.fromarray(alpha_HW))
    opened_HW3 = np.asarray(open_image(file(see_through, "PNG")))
    assert (opened_HW3[:32] == 255).all()
    np.testing.assert_array_equal(opened_HW3[32:], np.asarray(photo)[32:])


def test_a_transparent_colour_of_a_palette_or_of_greys_is_white(photo: Image.Image) -> None:
    palette, grey = photo.convert("P"), photo.convert("L")
    for image, index in ((palette, palette.getpixel((0, 0))), (grey, grey.getpixel((0, 0)))):
        opened = open_image(file(image, "PNG", transparency=index))
        assert opened.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.*g")), ids=lambda path: path.name)
def test_a_plain_photo_keeps_its_pixels(path: Path) -> None:
    """Without orientation, transparency or 16 bits: what Pillow decodes, so the accuracy of bundles holds."""
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(open_image(path.read_bytes())), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "form"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG")]
)
def test_a_plain_photo_of_any_mode_keeps_its_pixels(photo: Image.Image, mode: str, form: str) -> None:
    data = file(photo.convert(mode), form)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("bits", "shift"), [(8, 0), (10, 2), (12, 4), (14, 6), (16, 8)])
def test_greys_of_fewer_bits_in_16_are_scaled_by_what_is_there(bits: int, shift: int) -> None:
    wide_HW = np.linspace(0, (1 << bits) - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    opened = np.asarray(open_image(file(Image.fromarray(wide_HW), "PNG")))
    np.testing.assert_array_equal(opened[..., 0], wide_HW >> shift)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}])
def test_a_jpeg_without_its_end_mark_is_read(photo: Image.Image, options: dict[str, object]) -> None:
    whole = file(photo, "JPEG", **options)
    np.testing.assert_array_equal(np.asarray(open_image(whole[:-2])), np.asarray(open_image(whole)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_called_truncated(photo: Image.Image, form: str) -> None:
    data = file(photo, form)
    with pytest.raises(InvalidInput, match=f"this {form} file is truncated"):
        open_image(data[: len(data) * 2 // 3])


def test_a_file_followed_by_a_video_is_one_photo(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x010E] = "\xff\xda" * 200  # looks like scans
    data = file(photo, "JPEG", exif=exif) + b"\xff\xda\0\2" * 100
    assert open_image(data).size == photo.size


def test_a_108_megapixel_phone_is_read_at_reduced_scale() -> None:
    flat = file(Image.new("L", (12_000, 9_000), 77), "JPEG")
    opened = open_image(flat)
    assert opened.size == (4_000 * 3 // 4, 9_000 // 4)
    assert opened.getpixel((1_000, 1_000)) == (77, 77, 77)


def test_a_large_png_is_reduced_after_it_is_decoded() -> None:
    assert open_image(file(Image.new("1", (8_192, 6_144)), "PNG")).size == (4_096, 3_072)


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


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "AVIF"])
def test_other_formats_are_named(photo: Image.Image, form: str) -> None:
    with pytest.raises(InvalidInput, match=f"this is an? {form} file"):
        open_image(file(photo, form))


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (gzip.compress, "gzip data"),
        (base64.b64encode, "base64 text"),
        (lambda data: b"data:image/png;base64," + base64.b64encode(data), "base64 text"),
        (lambda data: b'--x1\r\nContent-Disposition: form-data; name="f"\r\n\r\n' + data, "a multipart form"),
        (lambda data: b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + data, "a HEIC file"),
        (lambda data: b"\0\0\0\x1cftypisom\0\0\0\0" + data, "an MP4"),
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_wrapped_photos_are_named(photo: Image.Image, form: str, wrap: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(InvalidInput, match=f"this is {words}"):
        open_image(wrap(file(photo, form)))


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
def test_exhausted_memory_is_overload(photo: Image.Image, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr(images, "to_rgb", load)
    with pytest.raises(Overloaded, match="not enough memory"):
        open_image(file(photo, "PNG"))


def test_a_phone_photo_stands_upright() -> None:
    """Phones store the sensor's picture and a note how to turn it."""
    sideways = Image.fromarray(np.linspace(0, 255, 32 * 16 * 3, dtype=np.uint8).reshape(32, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise to stand upright
    buffer = io.BytesIO()
    sideways.save(buffer, "PNG", exif=exif)
    upright = np.asarray(open_image(buffer.getvalue()))
    np.testing.assert_array_equal(upright, np.rot90(np.asarray(sideways), -1))
