from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from isthmus.models.vision.geometry import Geometry, placement
from isthmus.models.vision.images import (
    FITS,
    FULL_SCALE_PIXELS,
    GIVEN_SIZE,
    ORIENTATION,
    View,
    fitted,
    geometry,
    given_size,
    open_image,
    shrink,
    to_rgb,
)
from isthmus.models.vision.manifest import Fit, Preprocessing

PLAIN = {"mean": (0.5, 0.25, 1.0), "deviation": (0.5, 0.5, 0.5)}


def spec(fit: Fit, resize: int = 64, crop: tuple[int, int] = (48, 64)) -> Preprocessing:
    return Preprocessing(resize=resize, crop=crop, fit=fit, **PLAIN)  # type: ignore[arg-type]


def ramps(width: int, height: int) -> Image.Image:
    """Red says how far right a pixel is, green how far down."""
    pixels_HW3 = np.zeros((height, width, 3), np.uint8)
    pixels_HW3[..., 0] = np.round(255 * (np.arange(width) + 0.5) / width)
    pixels_HW3[..., 1] = np.round(255 * (np.arange(height) + 0.5) / height)[:, None]
    pixels_HW3[..., 2] = 255
    return Image.fromarray(pixels_HW3)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(FITS), st.integers(20, 300), st.integers(20, 300), st.sampled_from([(48, 64), (64, 48), (64, 64)])
)
def test_the_way_back_is_that_of_the_image(fit: Fit, width: int, height: int, crop: tuple[int, int]) -> None:
    """What the network sees at the middle of a pixel comes from where the geometry says."""
    how, photo = spec(fit, crop=crop), ramps(width, height)
    seen_HW3, back = fitted(photo, View.of(how)), geometry(photo, how)
    rows, columns = np.nonzero(seen_HW3[..., 2] == 255) if fit == "letterbox" else np.indices(crop).reshape(2, -1)
    points_N2 = back.points(np.stack([columns + 0.5, rows + 0.5], 1))
    colours_N2 = seen_HW3[rows, columns, :2] / 255
    inside = (np.abs(points_N2 / [width, height] - 0.5) < 0.5 - 2 / min(crop)).all(1)  # filters end at borders
    assert inside.any()
    off_N2 = np.abs(colours_N2 - points_N2 / [width, height])[inside]
    assert off_N2.max() <= 1.5 / min(crop) + 2 / 255 and off_N2.mean() <= 0.5 / min(crop) + 1 / 255


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(FITS), st.integers(1, 5000), st.integers(1, 5000))
def test_boxes_come_back_clipped_and_whole(fit: Fit, width: int, height: int) -> None:
    at = placement(fit, 64, (48, 64), (width, height))
    back = Geometry(at, width, height)
    photo_4 = np.array([[at.left, at.top, at.left + at.width, at.top + at.height]], np.float32)
    np.testing.assert_allclose(back.boxes(photo_4), [[0, 0, width, height]], rtol=1e-4)
    boxes_N4 = back.boxes(np.random.default_rng(0).uniform(-50, 120, (30, 4)).astype(np.float32))
    assert (boxes_N4 >= 0).all() and (boxes_N4 <= [width, height, width, height]).all()
    if fit == "letterbox":
        assert at.left >= 0 and at.top >= 0 and at.width <= 64 and at.height <= 48
        assert at.width == 64 or at.height == 48
    else:
        assert at.left <= 0 and at.top <= 0 and at.left + at.width >= 64 and at.top + at.height >= 48


@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (1, 1)])
@pytest.mark.parametrize("fit", FITS)
def test_the_thinnest_photos_fit(fit: Fit, size: tuple[int, int]) -> None:
    assert fitted(Image.new("RGB", size), View.of(spec(fit))).shape == (48, 64, 3)


def test_a_letterbox_is_filled_with_the_mean() -> None:
    seen_HW3 = fitted(Image.new("RGB", (100, 50), "white"), View.of(spec("letterbox")))
    assert seen_HW3[0, 0].tolist() == seen_HW3[-1, -1].tolist() == [128, 64, 255]
    assert (seen_HW3[8:40] == 255).all() and (seen_HW3[:8, :, 1] == 64).all() and (seen_HW3[40:, :, 1] == 64).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(640, 360), (333, 517), (1000, 251)])
def test_a_photo_sent_whole_lies_where_the_photo_lay(fit: Fit, size: tuple[int, int]) -> None:
    how = spec(fit)
    small = shrink(Image.new("RGB", size), how.resize, fit)
    before, after = (placement(fit, how.resize, how.crop, each) for each in (size, small.size))
    for name in ("width", "height", "left", "top"):
        assert abs(getattr(before, name) - getattr(after, name)) <= 1


def test_the_size_given_is_that_of_the_upright_photo() -> None:
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    buffer = io.BytesIO()
    Image.new("L", (5000, 4000)).save(buffer, "JPEG", exif=turned)
    opened = open_image(buffer.getvalue())
    assert opened.size[0] * opened.size[1] <= FULL_SCALE_PIXELS
    assert given_size(opened) == (4000, 5000)
    back = geometry(opened, spec("stretch"))
    np.testing.assert_allclose(back.boxes(np.array([[0, 0, 64, 48]], np.float32)), [[0, 0, 4000, 5000]])


def test_an_image_that_was_changed_since_has_its_own_size() -> None:
    opened = to_rgb(Image.new("RGB", (80, 40)))
    assert opened.info[GIVEN_SIZE] == (80, 40)
    assert given_size(to_rgb(opened.resize((20, 10)))) == (20, 10)
