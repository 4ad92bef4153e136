from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from isthmus.models.errors import InvalidInput
from tests.bench.image_codecs import COARSE, CODECS, LADDERS, ImageCodec, ladder


@pytest.fixture(scope="module")
def grey() -> Image.Image:
    """A smooth RGB photo without colour, 96x120."""
    down, across = np.mgrid[0:120, 0:96]
    pixels_HW = 128 + 60 * np.sin(down / 9) + 60 * np.cos(across / 7)
    return Image.fromarray(pixels_HW.clip(0, 255).astype(np.uint8)).convert("RGB")


def error(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


@pytest.mark.parametrize("form", [*CODECS, "png"])
def test_a_photo_comes_back_rgb_and_alike(form: str, grey: Image.Image, photo: Image.Image) -> None:
    codec = ImageCodec(form, 90)
    for image in (grey, photo):
        back = codec.decode(codec.encode(image))
        assert back.mode == "RGB" and back.size == image.size
        assert error(back, image) < (0.1 if form == "png" else 12)


@pytest.mark.parametrize("form", CODECS)
def test_lower_quality_and_fewer_pixels_take_fewer_bytes(form: str, photo: Image.Image) -> None:
    sizes = [len(ImageCodec(form, quality).encode(photo)) for quality in (90, 50, 5)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert len(ImageCodec(form, 50, 32).encode(photo)) < sizes[1]


@pytest.mark.parametrize("form", CODECS)
def test_pixels_shrink_the_shorter_side_before_coding(form: str, grey: Image.Image) -> None:
    codec = ImageCodec(form, 75, 48)
    assert codec.decode(codec.encode(grey)).size == (48, 60)
    larger = ImageCodec(form, 75, 500)
    assert larger.decode(larger.encode(grey)).size == grey.size, "nothing is blown up"


def test_grey_photos_are_stored_grey_and_colour_stays(grey: Image.Image, photo: Image.Image) -> None:
    for image, mode in ((grey, "L"), (photo, "RGB")):
        with Image.open(io.BytesIO(ImageCodec("jpeg", 75).encode(image))) as stored:
            assert stored.mode == mode


def test_avif_is_read_here_alone(grey: Image.Image) -> None:
    data = ImageCodec("avif", 60).encode(grey)
    with pytest.raises(InvalidInput, match="not a readable"):
        ImageCodec("jpeg", 60).decode(data)


@pytest.mark.parametrize("form", CODECS)
def test_a_ladder_names_each_setting_once(form: str) -> None:
    steps = ladder(form, 300)
    names = [name for name, _ in steps]
    assert len(set(names)) == len(names) == sum(map(len, LADDERS[form].values()))
    for name, codec in steps:
        suffix = "" if codec.pixels == 300 else f"@{codec.pixels}"
        assert name == f"q{codec.quality}{suffix}" and codec.form == form
    assert {codec.pixels for _, codec in steps} >= {300, 150}


@pytest.mark.parametrize("form", CODECS)
def test_coarse_settings_come_on_top(form: str) -> None:
    fine, coarse = dict(ladder(form, 260)), dict(ladder(form, 260, coarse=True))
    assert fine.items() <= coarse.items() and len(coarse) == len(fine) + sum(map(len, COARSE[form].values()))
    assert min(codec.quality for codec in coarse.values()) <= 10
