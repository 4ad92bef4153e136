"""Photos as files of the formats that only a device reads."""

from __future__ import annotations

import io

from PIL import Image
from pillow_heif import from_pillow


def camera_file(image: Image.Image, form: str, **options: object) -> bytes:
    """A file of this format, as phones and cameras make them."""
    buffer = io.BytesIO()
    if form == "HEIC":
        from_pillow(image).save(buffer, **options)
    else:
        image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()
