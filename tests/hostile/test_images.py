"""Photos made to hurt: an InvalidInput before memory or time is spent on them."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.vision.images import encode_image, open_image, preprocess
from isthmus.models.vision.manifest import Preprocessing


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, with a few bytes of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


HOSTILE = {
    "empty": b"",
    "text": b"hello",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": b"%PDF-1.4\n",
    "zip": b"PK\x03\x04" + bytes(100),
    "JPEG mark alone": b"\xff\xd8\xff",
    "PNG mark alone": b"\x89PNG\r\n\x1a\n",
    "WebP mark alone": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    "PNG without pixels": png_of_size(0, 0),
    "PNG with too few pixels": png_of_size(640, 480),
    "bomb just over the limit": png_of_size(10_000, 5_001),
    "bomb of Pillow's warning": png_of_size(10_000, 10_000),
    "bomb of 4 gigapixels": png_of_size(65_535, 65_535),
    "bomb of 2**62 pixels": png_of_size((1 << 31) - 1, (1 << 31) - 1),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_photos_are_refused(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput):
            open_image(data)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_photo_over_the_limit_is_told_its_size() -> None:
    with pytest.raises(InvalidInput, match="10000x5001 pixels, at most 50000000"):
        open_image(png_of_size(10_000, 5_001))


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_a_truncated_photo_is_refused(photo: Image.Image, form: str) -> None:
    data = encode_image(photo, form, quality=75)  # type: ignore[arg-type]
    for size in range(0, len(data) - 16, 97):
        with pytest.raises(InvalidInput):
            open_image(data[:size])


@given(data=st.binary(max_size=200), start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"]))
def test_random_bytes_are_refused(data: bytes, start: bytes) -> None:
    with pytest.raises(InvalidInput):
        open_image(start + data)


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_a_damaged_photo_is_refused_or_opened(photo: Image.Image, form: str) -> None:
    good, rng = encode_image(photo, form, quality=75), random.Random(0)  # type: ignore[arg-type]
    outcomes = set()
    for _ in range(100):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            outcomes.add(open_image(bytes(data)).mode)
        except InvalidInput:
            outcomes.add("refused")
    assert "refused" in outcomes
    assert outcomes <= {"refused", "RGB"}


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1)])
def test_a_photo_of_one_line_stays_small(size: tuple[int, int]) -> None:
    """Scaled as a whole it would take 300 x 19,500,000 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (255, 255, 255)).save(buffer, "PNG")
    spec = Preprocessing(resize=300, crop=(300, 300), mean=(0.0, 0.0, 0.0), deviation=(1.0, 1.0, 1.0))
    np.testing.assert_array_equal(preprocess(open_image(buffer.getvalue()), spec), np.ones((3, 300, 300)))
