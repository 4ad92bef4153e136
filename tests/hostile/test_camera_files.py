"""Files in the formats of phones and cameras that are made to hurt: one line, before memory is spent on them."""

from __future__ import annotations

import random
import struct
import tracemalloc
from contextlib import suppress

import pytest
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.vision.camera_files import open_photo
from tests.camera_file import camera_file

FORMS = ("AVIF", "BMP", "GIF", "HEIC", "TIFF")


SMALL = {form: camera_file(Image.effect_noise((64, 64), 90).convert("RGB"), form) for form in FORMS}


def patched(form: str, old: bytes, new: bytes) -> bytes:
    assert old in SMALL[form]
    return SMALL[form].replace(old, new, 1)


def gif(canvas: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """Of one frame that is disposed of, so that Pillow makes room for it when it opens the file."""
    control = b"!\xf9\x04\x08\0\0\0\0"
    return b"GIF89a" + struct.pack("<2H3B", *canvas, 0, 0, 0) + control + struct.pack("<B4HB", 44, 0, 0, *frame, 0)


HOSTILE = {
    **{f"{form} of its first bytes": data[:24] for form, data in SMALL.items()},
    "BMP mark alone": b"BM",
    "GIF mark alone": b"GIF89a",
    "GIF of endless extensions": b"GIF89a" + struct.pack("<2H3B", 9, 9, 0, 0, 0) + b"!\xfe\0" * 500_000,
    "GIF of an endless comment": b"GIF89a" + struct.pack("<2H3B", 9, 9, 0, 0, 0) + b"!\xfe" + b"\1a" * 500_000,
    "GIF whose canvas is a bomb": gif((65_535, 65_535), (9, 9)) + b"\2\0;",
    "GIF whose frame is a bomb": gif((9, 9), (65_535, 65_535)) + b"\2\0;",
    "BMP bomb": patched("BMP", struct.pack("<2i", 64, 64), struct.pack("<2i", 60_000, 60_000)),
    "BMP of negative width": patched("BMP", struct.pack("<2i", 64, 64), struct.pack("<2i", -64, 64)),
    "TIFF bomb": patched("TIFF", struct.pack("<2H2I", 256, 4, 1, 64), struct.pack("<2H2I", 256, 4, 1, 2**31)),
    "TIFF of floating-point pixels": camera_file(Image.new("F", (9, 9)), "TIFF"),
    "TIFF of no pages": b"II*\0\0\0\0\0",
    "TIFF whose page lies behind the end": b"II*\0\xff\xff\xff\x7f",
    "HEIC bomb": patched("HEIC", struct.pack(">2I", 64, 64), struct.pack(">2I", 60_000, 60_000)),
    "HEIC that says it is small": patched("HEIC", struct.pack(">2I", 64, 64), struct.pack(">2I", 1, 1)),
    "AVIF bomb": patched("AVIF", struct.pack(">2I", 64, 64), struct.pack(">2I", 30_000, 30_000)),
    "AVIF of no pixels": patched("AVIF", struct.pack(">2I", 64, 64), bytes(8)),
    "video": b"\0\0\0\x18ftypisom\0\0\0\0isomiso2",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused_in_a_line(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput) as caught:
            open_photo(data)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_file_is_refused(form: str) -> None:
    data = SMALL[form]
    for size in range(0, len(data) * 3 // 4, max(1, len(data) // 16)):
        with pytest.raises(InvalidInput):
            open_photo(data[:size])


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_file_is_refused_or_opened(form: str) -> None:
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(SMALL[form])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with suppress(InvalidInput):
            assert open_photo(bytes(data)).mode == "RGB"


def test_an_animated_avif_is_refused() -> None:
    frames = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (0, 90, 200)]
    with pytest.raises(InvalidInput, match="animation of 3 frames"):
        open_photo(camera_file(frames[0], "AVIF", save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("name", ["GIF of endless extensions", "GIF of an endless comment"])
def test_a_flood_of_blocks_is_refused_before_pillow_reads_it(name: str) -> None:
    with pytest.raises(InvalidInput, match="more than 1024 blocks"):
        open_photo(HOSTILE[name])
