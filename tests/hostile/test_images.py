"""Photos made to hurt: an InvalidInput before memory or time is spent on them."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.vision.images import MAX_DECODE_BYTES, encode_image, open_image, preprocess
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
    "bomb just over the limit": png_of_size(8_192, 8_193),
    "WebP bomb of 34 bytes": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f\0\x88\x88\x08\0\0\0\0",
    "extended WebP bomb": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff\x3f\0" * 2,
    "lossy WebP bomb": b"RIFF\x16\0\0\0WEBPVP8 \x0a\0\0\0\x10\0\0\x9d\x01\x2a" + b"\xff\x3f" * 2,
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
    with pytest.raises(InvalidInput, match="8192x8193 pixels, at most 67108864"):
        open_image(png_of_size(8_192, 8_193))
    with pytest.raises(InvalidInput, match="1000x1001 pixels, at most 1000000"):
        open_image(png_of_size(1_000, 1_001), 1_000_000)


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


def peak_bytes(data: bytes, max_pixels: int | None = None) -> int:
    """The most resident memory that decoding adds, in a process of its own."""
    code = """
import resource, sys
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.images import open_image
data, limit = sys.stdin.buffer.read(), int(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_image(data, limit or None)
except InvalidInput:
    pass
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    command = [sys.executable, "-c", code, str(max_pixels or 0)]
    return int(subprocess.run(command, input=data, capture_output=True, check=True).stdout)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "form"), [("I;16", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG")]
)
def test_the_largest_photos_stay_within_the_stated_memory(mode: str, form: str) -> None:
    """A 16-bit PNG of 97 KB took 945 MiB."""
    assert peak_bytes(encoded(Image.new(mode, (8_000, 8_000)), form)) < MAX_DECODE_BYTES


def test_a_large_webp_stays_within_the_stated_memory() -> None:
    assert peak_bytes(encoded(Image.new("RGBA", (5_400, 5_400)), "WEBP", lossless=True, method=0)) < MAX_DECODE_BYTES


def test_a_progressive_jpeg_stays_within_the_stated_memory() -> None:
    data = encoded(Image.new("RGB", (8_100, 8_100)), "JPEG", progressive=True, subsampling=0)
    assert peak_bytes(data) < MAX_DECODE_BYTES


def test_a_photo_over_the_service_s_cap_costs_nothing() -> None:
    for form in ("PNG", "WEBP", "JPEG"):
        assert peak_bytes(encoded(Image.new("RGB", (4_000, 4_000)), form), 1 << 20) < 16 << 20


def jpeg_of_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(Image.new("L", (64, 64), 9), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_they_are_decoded() -> None:
    with pytest.raises(InvalidInput, match="more than 32 scans"):
        open_image(jpeg_of_scans(11_162))
    assert open_image(jpeg_of_scans(5)).size == (64, 64)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8" + b"\xff\x01" * 2_000_000,
        b"\xff\xd8" + b"\xff\xfe\0\2" * 1_000_000,
        png_of_size(8, 8)[:33] + (bytes(4) + b"teSt" + bytes(4)) * 340_000,
    ],
    ids=["JPEG of empty markers", "JPEG of empty comments", "PNG of empty chunks"],
)
def test_floods_of_empty_segments_are_refused_at_once(data: bytes) -> None:
    started_s = time.process_time()
    with pytest.raises(InvalidInput, match="more than"):
        open_image(data)
    assert time.process_time() - started_s < 0.1


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animations_are_refused(photo: Image.Image, form: str) -> None:
    data = encoded(photo, form, save_all=True, append_images=[photo.rotate(90), photo.rotate(180)])
    with pytest.raises(InvalidInput, match=f"this {form} file is an animation of 3 frames"):
        open_image(data)


def test_broken_photos_leave_nothing_behind() -> None:
    """32 truncated PNGs left 6.1 GiB behind: each error kept its pixels alive."""
    data = encoded(Image.new("RGB", (4_000, 4_000)), "PNG")
    code = """
import gc, sys
from pathlib import Path
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.images import open_image
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
gc.disable()
data, errors = sys.stdin.buffer.read(), []
for count in range(9):
    try:
        open_image(data)
    except InvalidInput as error:
        errors.append(error)
    if count == 0:
        before = resident()
assert len(errors) == 9
print(resident() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], input=data[: len(data) // 2], capture_output=True, check=True)
    assert int(run.stdout) < 64 << 20  # the size of one
