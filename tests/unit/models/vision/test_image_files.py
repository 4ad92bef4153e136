from __future__ import annotations

import io

import pytest
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.vision import image_files
from isthmus.models.vision.image_files import JpegScans, check_png_chunks, form_of, is_truncated, jpeg_scans, webp_size


def encoded(form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((301, 57), 90).convert("RGB").save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_formats_and_their_ends_are_recognised(form: str) -> None:
    data = encoded(form)
    assert form_of(data) == form
    assert not is_truncated(data, form)  # type: ignore[arg-type]
    assert is_truncated(data[: len(data) // 2], form)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}])
def test_the_size_of_every_kind_of_webp(options: dict[str, object]) -> None:
    assert webp_size(encoded("WEBP", **options)) == (301, 57)


@pytest.mark.parametrize("data", [b"RIFF\0\0\0\0WEBP", b"RIFF\0\0\0\0WEBPALPH" + bytes(20)])
def test_a_webp_without_an_image_has_no_size(data: bytes) -> None:
    assert webp_size(data) is None


def test_scans_are_counted_up_to_the_end_mark() -> None:
    baseline, progressive = encoded("JPEG"), encoded("JPEG", progressive=True)
    assert jpeg_scans(baseline, 32) == JpegScans(1, True)
    assert jpeg_scans(baseline + progressive, 32) == JpegScans(1, True)
    assert jpeg_scans(baseline[:-2], 32) == JpegScans(1, False)
    assert jpeg_scans(progressive, 32) == JpegScans(10, True)
    assert jpeg_scans(progressive, 4) == JpegScans(5, False)


def test_a_png_has_no_more_chunks_than_its_length_justifies(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("PNG")
    check_png_chunks(data)
    monkeypatch.setattr(image_files, "MAX_CHUNKS", -100)
    with pytest.raises(InvalidInput, match="chunks"):
        check_png_chunks(data)
