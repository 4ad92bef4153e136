"""Photos in the forms that callers have them -> RGB images."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.vision.images import open_image

Photo = Image.Image | bytes | str | os.PathLike[str]

MAX_FILE_BYTES = 64 << 20  # an original from a camera; the decoded size has a bound of its own


def as_image(photo: Photo) -> Image.Image:
    """An RGB image from a PIL image, the bytes of an image file, or its path.

    Raises InvalidInput if it cannot be read or is too large.
    """
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
