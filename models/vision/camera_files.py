"""Photos in the formats that phones and cameras write, beside those that cross the wire: file -> RGB pixels.

    JPEG PNG WEBP   `images.open_image`
    AVIF            Pillow 11.3 or newer
    HEIC            pillow-heif, the extra `heif`; the primary image
    GIF             the first frame
    TIFF            the first page
    BMP

Only a device reads these: what a service accepts stays small. Knows nothing about paths and file objects.
"""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, features
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.TiffImagePlugin import TiffImageFile

from isthmus.models.errors import InvalidInput
from isthmus.models.vision.image_files import CameraForm, camera_form_of, form_of, gif_size, name_of
from isthmus.models.vision.images import FORMATS, check_pixels, guarded, open_image, to_rgb

CAMERA_FORMATS = (*FORMATS, "HEIC", "AVIF", "TIFF", "BMP", "GIF")
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of a TIFF


def open_photo(data: bytes) -> Image.Image:
    """Decode any file of CAMERA_FORMATS into RGB, as `images.open_image` does those that it reads.

    Sizes and frames are checked before pixels are decoded. Raises InvalidInput and Overloaded as `open_image` does, and
    InvalidInput when what reads the format is not installed.
    """
    if form_of(data) is not None:
        return open_image(data)
    form = camera_form_of(data)
    if form is None:
        raise InvalidInput(f"not a readable {', '.join(CAMERA_FORMATS)} image: {name_of(data)} ({len(data)} bytes)")
    return guarded(lambda: decode(data, form), lambda: f"this {form} file is broken or truncated ({len(data)} bytes)")


def decode(data: bytes, form: CameraForm) -> Image.Image:
    """The file as an upright RGB image. Raises InvalidInput for what the limits exclude, else what Pillow raises."""
    if form == "GIF":
        if (size := gif_size(data)) is None:
            raise OSError("no frame")
        check_pixels(size, form, None)
    with OPENERS[form](io.BytesIO(data)) as image:
        check_pixels(image.size, "HEIC with transparency" if form == "HEIC" and image.mode == "RGBA" else form, None)
        if isinstance(image, TiffImageFile):
            check_pixels((tag(image, TILE_WIDTH), tag(image, TILE_LENGTH)), form, None)
        if form == "AVIF" and (frames := getattr(image, "n_frames", 1)) > 1:
            raise InvalidInput(f"this {form} file is an animation of {frames} frames, expected a single image")
        return to_rgb(image)


def tag(image: TiffImageFile, number: int) -> int:
    """A tag of a TIFF that is a whole number, 1 where it is missing."""
    value = image.tag_v2.get(number, 1)
    return value if isinstance(value, int) else 0


def open_avif(file: io.BytesIO) -> Image.Image:
    if not features.check("avif"):
        raise InvalidInput("this is an AVIF file, which Pillow reads from version 11.3 on: pip install -U pillow")
    return AvifImageFile(file)


def open_heic(file: io.BytesIO) -> Image.Image:
    try:
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError:
        raise InvalidInput("this is a HEIC file, which needs pillow-heif: pip install 'isthmus[heif]'") from None
    opener: Callable[[io.BytesIO], Image.Image] = HeifImageFile  # it has no types
    return opener(file)


OPENERS: dict[CameraForm, Callable[[io.BytesIO], Image.Image]] = {
    "AVIF": open_avif,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "HEIC": open_heic,
    "TIFF": TiffImageFile,
}
