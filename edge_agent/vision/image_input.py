"""Photos in the forms that callers have them -> RGB images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isthmus.models.errors import InvalidInput
from isthmus.models.vision.camera_files import open_photo
from isthmus.models.vision.images import guarded, to_rgb

Photo = Image.Image | NDArray[Any] | bytes | bytearray | memoryview | str | os.PathLike[str] | IO[bytes]

MAX_FILE_BYTES = 64 << 20  # an original from a camera; the decoded size has a bound of its own


def as_image(photo: Photo) -> Image.Image:
    """An RGB image from a PIL image, an array, an image file's bytes, its path, or a binary file object.

    An array is RGB of shape (H, W, 3) and uint8, or grey of shape (H, W) and uint8 or uint16. Every form of one photo
    gives the same pixels; only a JPEG of more than `images.FULL_SCALE_PIXELS` is reduced differently as a file.

    Raises InvalidInput if it cannot be read, is too large or of another type, and Overloaded if memory is exhausted.
    """
    match photo:
        case Image.Image():
            return guarded(
                lambda: to_rgb(photo), lambda: "the PIL image cannot be read; is its file truncated or closed?"
            )
        case np.ndarray():
            return from_array(photo)
        case bytes():
            return open_photo(photo)
        case bytearray() | memoryview():
            return open_photo(bytes(photo))
        case str() | os.PathLike():
            return open_photo(read_path(photo))
        case _ if callable(getattr(photo, "read", None)):
            return open_photo(read_capped(photo, "file object"))
    raise InvalidInput(
        f"a photo is a path, bytes, a binary file object, a PIL image or a NumPy array, got {type(photo).__name__}"
    )


def from_array(pixels: NDArray[Any]) -> Image.Image:
    """An RGB image from an array of pixels, as `as_image` describes it. Raises InvalidInput for any other array."""
    colour = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    grey = pixels.ndim == 2 and pixels.dtype in (np.uint8, np.uint16)
    if not (colour or grey) or not pixels.size:
        raise InvalidInput(
            f"the array is {pixels.dtype} of shape {pixels.shape}, expected RGB: uint8 of (H, W, 3), "
            "or grey: uint8 or uint16 of (H, W)"
        )
    return guarded(
        lambda: to_rgb(Image.fromarray(np.ascontiguousarray(pixels))), lambda: "the array cannot be read as an image"
    )


def read_path(path: str | os.PathLike[str]) -> bytes:
    """The file's bytes. Raises InvalidInput if it cannot be read or has more than MAX_FILE_BYTES."""
    name = f"{os.fspath(path)!s:.200}"
    try:
        with Path(path).open("rb") as file:
            return read_capped(file, name)
    except OSError as error:
        raise InvalidInput(f"{name}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidInput(f"{name!r} is not a path: {error}") from error


def read_capped(file: IO[bytes], name: str) -> bytes:
    """What the file object has left. Raises InvalidInput for text, a closed file, or more than MAX_FILE_BYTES."""
    try:
        data = file.read(MAX_FILE_BYTES + 1)
    except ValueError as error:  # closed, or not open for reading
        raise InvalidInput(f"{name}: {error}") from error
    if not isinstance(data, bytes):
        raise InvalidInput(f"{name}: gives {type(data).__name__}, open it in binary mode")
    if len(data) > MAX_FILE_BYTES:
        raise InvalidInput(f"{name}: larger than {MAX_FILE_BYTES} bytes")
    return data
