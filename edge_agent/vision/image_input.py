"""Photos as callers give them -> RGB images."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.vision.images import open_image

Photo = Image.Image | bytes | str | os.PathLike[str]

MAX_FILE_BYTES = 64 << 20  # a camera's own file; what it decodes to is bounded apart


def as_image(photo: Photo) -> Image.Image:
    """RGB image of whatever was given. Raises InvalidInput."""
    if isinstance(photo, Image.Image):
        return photo.convert("RGB")
    if isinstance(photo, (str, os.PathLike)):
        path = Path(photo)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise InvalidInput(f"{path}: larger than {MAX_FILE_BYTES} bytes")
            photo = path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{path}: {error.strerror}") from error
    return open_image(photo)
