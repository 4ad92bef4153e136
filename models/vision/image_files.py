"""The headers of image files: what a file is, how large, in how many scans, and whether it is complete.

Reads bytes without decoding pixels. Knows nothing about Pillow or limits.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Literal

from isthmus.models.errors import InvalidInput

Form = Literal["JPEG", "PNG", "WEBP"]
CameraForm = Literal["AVIF", "BMP", "GIF", "HEIC", "TIFF"]

SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"GIF8", "a GIF file"),
    (b"BM", "a BMP file"),
    (b"II*\0", "a TIFF file"),
    (b"MM\0*", "a TIFF file"),
    (b"\x1f\x8b", "gzip data"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL file"),
    (b"\xff\x0a", "a JPEG XL file"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
    (b"%PDF", "a PDF file"),
    (b"PK\x03\x04", "a ZIP file"),
    (b"data:image/", "base64 text"),
    (b"/9j/", "base64 text"),  # of a JPEG, a PNG, a WebP
    (b"iVBORw0KGgo", "base64 text"),
    (b"UklGR", "base64 text"),
    (b"<", "SVG, XML or HTML text"),
    (b"{", "JSON text"),
)
CAMERA_FORMS: dict[str, CameraForm] = {  # by what `name_of` says
    "this is an AVIF file": "AVIF",
    "this is a BMP file": "BMP",
    "this is a GIF file": "GIF",
    "this is a HEIC file": "HEIC",
    "this is a TIFF file": "TIFF",
}
MULTIPART = re.compile(rb"\s*--[^\r\n]{1,70}\r?\ncontent-", re.IGNORECASE)
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG; neither a stuffed 255 nor a restart
MAX_MARKERS = 4096  # of a JPEG: 64 MB in the largest segments have 1,024
MAX_CHUNKS = 1024  # of a PNG, and one more for each 4,096 bytes: libpng writes chunks of 8,192
MAX_BLOCKS = 1024  # of a GIF before its first frame
SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01


def form_of(data: bytes) -> Form | None:
    """The format by its first bytes, or None if it is none of the three."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def camera_form_of(data: bytes) -> CameraForm | None:
    """The format by its first bytes, of those that only a device reads, or None if it is none of them."""
    return CAMERA_FORMS.get(name_of(data))


def name_of(data: bytes) -> str:
    """What bytes that are none of the three formats are, in words."""
    if not data:
        return "empty"
    if data[4:8] == b"ftyp":
        return "this is " + container(data[8:64])
    if MULTIPART.match(data[:1024]):
        return "this is a multipart form, send the file itself as the body"
    found = next((name for signature, name in SIGNATURES if data.startswith(signature)), None)
    return f"this is {found}" if found else "the format is unknown"


def container(brands: bytes) -> str:
    """An ISO media file by its brands, the major one first."""
    if b"avif" in brands or b"avis" in brands:
        return "an AVIF file"
    heif = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return "a HEIC file" if any(brand in brands for brand in heif) else "an MP4 or QuickTime video"


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP file's canvas, or None when its first chunk is not an image.

    RFC 9649, sections 2.5 to 2.7 and RFC 6386, section 9.1. Pillow allocates the canvas when it opens the file.
    """
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def gif_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that hold a GIF's canvas and its first frame, or None when it has no frame.

    GIF89a, sections 18 to 24. Pillow may allocate both when it opens the file. Raises InvalidInput for more than
    MAX_BLOCKS blocks before the frame, because Pillow copies a comment once for each.
    """
    size = struct.Struct("<2H")
    if len(data) < 13:
        return None
    width, height = size.unpack_from(data, 6)
    at, blocks = 13 + color_table(data[10]), 0
    while data[at : at + 1] == b"!":  # an extension, of blocks that each state their length
        at += 2
        while length := int.from_bytes(data[at : at + 1]):
            at, blocks = at + 1 + length, blocks + 1
            check_blocks(blocks)
        at, blocks = at + 1, blocks + 1
        check_blocks(blocks)
    if data[at : at + 1] != b"," or len(data) < at + 10:
        return None
    (left, top), (across, down) = size.unpack_from(data, at + 1), size.unpack_from(data, at + 5)
    return max(width, left + across), max(height, top + down)


def check_blocks(count: int) -> None:
    """Raises InvalidInput for more than MAX_BLOCKS."""
    if count > MAX_BLOCKS:
        raise InvalidInput(f"this GIF file has more than {MAX_BLOCKS} blocks before its first frame")


def color_table(flags: int) -> int:
    """Bytes of the table that a GIF's flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


@dataclass(frozen=True, slots=True)
class JpegScans:
    """The scans of a JPEG, and whether its end mark was found."""

    count: int
    ended: bool


def jpeg_scans(data: bytes, most: int) -> JpegScans:
    """Count the scans of a JPEG up to its end mark, or until there are more than `most`.

    Markers inside segments (a thumbnail, a profile) and in bytes after the end mark (a video) do not count.
    Raises InvalidInput for more than MAX_MARKERS, because Pillow takes microseconds for each.
    """
    count, markers, at = 0, 0, 2
    while count <= most and (found := MARKER.search(data, at)) is not None:
        kind, at = data[found.start() + 1], found.end()
        markers += 1
        if markers > MAX_MARKERS:
            raise InvalidInput(f"this JPEG file has more than {MAX_MARKERS} markers")
        if kind == EOI:
            return JpegScans(count, True)
        count += kind == SOS
        if kind not in (SOI, TEM):
            at += int.from_bytes(data[at : at + 2], "big")
    return JpegScans(count, False)


def check_png_chunks(data: bytes) -> None:
    """Raises InvalidInput for a PNG of more chunks than its length justifies: Pillow takes microseconds for each."""
    most, chunks, at = MAX_CHUNKS + len(data) // 4096, 0, 8
    while at < len(data):
        chunks += 1
        if chunks > most:
            raise InvalidInput(f"this PNG file has more than {most} chunks")
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def is_truncated(data: bytes, form: Form) -> bool:
    """Whether the file ends before its own end mark or stated length."""
    if form == "JPEG":
        return not jpeg_scans(data, len(data)).ended
    if form == "PNG":
        return b"IEND" not in data
    return 8 + int.from_bytes(data[4:8], "little") > len(data)
