"""Photos: file -> RGB pixels -> network input."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from isthmus.models.errors import InvalidInput
from isthmus.models.vision.manifest import Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000  # a 50-megapixel camera; 150 MB once decoded; checked before decompression


def open_image(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG or WebP file into RGB, turned upright by its EXIF orientation.

    Raises InvalidInput when it is of another format, broken, or larger than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InvalidInput(f"image has {width}x{height} pixels, at most {MAX_PIXELS} are accepted")
            return eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except InvalidInput:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error …
        raise InvalidInput(f"not a readable {', '.join(FORMATS)} image of {len(data)} bytes") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of at most 8 bits a channel. Of 16-bit greys the upper 8 are kept; Pillow's conversion clips at 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


def encode_image(image: Image.Image, form: Literal["jpeg", "png", "webp"], quality: int) -> bytes:
    """The image as a file of the given format."""
    buffer = io.BytesIO()
    image.save(buffer, form.upper(), quality=quality)
    return buffer.getvalue()


def is_grey(image: Image.Image) -> bool:
    """Whether the three channels of an RGB image are equal everywhere."""
    pixels_HW3 = np.asarray(image)
    return bool((pixels_HW3 == pixels_HW3[..., :1]).all())


def shrink(image: Image.Image, pixels: int) -> Image.Image:
    """The image scaled so that its shorter side has at most `pixels`, proportions kept."""
    shorter = min(image.size)
    if shorter <= pixels:
        return image
    width, height = (max(pixels, round(side * pixels / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def preprocess(image: Image.Image, spec: Preprocessing) -> NDArray[np.float32]:
    """RGB image -> float32 array of shape (3, crop height, crop width)."""
    scale = spec.resize / min(image.size)
    scaled_width, scaled_height = (max(spec.resize, round(side * scale)) for side in image.size)
    height, width = spec.crop
    left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
    across, down = image.width / scaled_width, image.height / scaled_height
    # Only the crop is resized: a 1 x 65,535 photo would grow to gigabytes if it were scaled as a whole.
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    pixels_HW3 = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box), dtype=np.float32)
    mean, deviation = np.array(spec.mean, np.float32), np.array(spec.deviation, np.float32)
    return np.ascontiguousarray(((pixels_HW3 / np.float32(255) - mean) / deviation).transpose(2, 0, 1))
