"""Photos: file -> RGB pixels -> network input."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from isthmus.models.errors import InvalidInput, IsthmusError, Overloaded
from isthmus.models.vision.geometry import Geometry, placement
from isthmus.models.vision.image_files import (
    Form,
    check_png_chunks,
    form_of,
    is_truncated,
    jpeg_scans,
    name_of,
    webp_size,
)
from isthmus.models.vision.manifest import Fit, Preprocessing

FileFormat = Literal["jpeg", "png", "webp", "avif"]
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_DECODE_BYTES = 512 << 20  # held at once while a photo is decoded
BYTES_PER_PIXEL = {  # held while decoding, with Pillow's four bytes a pixel and the conversions that follow
    "JPEG": 2,  # a large one is decoded at reduced scale, so a 200-megapixel phone's is read
    "progressive JPEG": 8,  # coefficients of all scans are kept at full size
    "PNG": 8,
    "WEBP": 18,  # libwebp keeps two canvases besides the frame
    "AVIF": 20,
    "BMP": 8,
    "GIF": 8,
    "HEIC": 11,  # 48 megapixels of a phone
    "HEIC with transparency": 20,
    "TIFF": 14,
}
FULL_SCALE_PIXELS = 16_000_000  # a larger photo is reduced by a whole factor before anything else is done with it
MAX_SCANS = 32  # of a JPEG; progressive encoders write about ten, and each costs a pass over all pixels
BACKGROUND = (255, 255, 255)  # shows through transparent pixels
ORIENTATION = 0x0112  # the EXIF tag
GIVEN_SIZE = "isthmus_given_size"  # in a decoded image's info: width and height of the photo before it was reduced
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FITS: tuple[Fit, ...] = get_args(Fit)
SIDEWAYS = (TURNS[5], TURNS[6], TURNS[7], TURNS[8])


def open_image(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode a JPEG, PNG or WebP file into RGB as `to_rgb` does, with at most MAX_DECODE_BYTES of memory.

    A JPEG of more than FULL_SCALE_PIXELS is decoded at 1/2, 1/4 or 1/8. A JPEG of which only the end mark is missing is
    read. `max_pixels` caps width x height further. Pixels, frames and scans are checked before pixels are decoded.

    Raises InvalidInput when the file is of another format (which is named), truncated, broken, animated or too large,
    and Overloaded when memory is exhausted.
    """
    form = form_of(data)
    if form is None:
        raise InvalidInput(f"not a readable {', '.join(FORMATS)} image: {name_of(data)} ({len(data)} bytes)")
    return guarded(lambda: decode(data, form, max_pixels), lambda: defect(data, form))


def open_file(path: Path) -> Image.Image:
    """As `open_image`, of a file. Raises OSError when it cannot be read."""
    return open_image(path.read_bytes())


def guarded(read: Callable[[], Image.Image], defect: Callable[[], str]) -> Image.Image:
    """`read()`, with Pillow's exceptions translated: InvalidInput with the words of `defect()`, or Overloaded.

    An error raised here refers to no frame of `read`, so the pixels decoded so far are freed at once.
    """
    failure: IsthmusError
    try:
        return read()
    except IsthmusError as error:
        failure = error.with_traceback(None)
    except MemoryError:
        failure = Overloaded("not enough memory to decode this image")
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error …
        out_of_memory = "out of memory" in str(error)
        failure = Overloaded("not enough memory to decode this image") if out_of_memory else InvalidInput(defect())
    raise failure


def defect(data: bytes, form: Form) -> str:
    """Why a file of a known format cannot be decoded."""
    state = "is truncated" if is_truncated(data, form) else "is broken"
    return f"not a readable {', '.join(FORMATS)} image: this {form} file {state} ({len(data)} bytes)"


def decode(data: bytes, form: Form, max_pixels: int | None) -> Image.Image:
    """The file as an upright RGB image. Raises InvalidInput for what the limits exclude, else what Pillow raises."""
    if form == "JPEG":
        return decode_jpeg(data, max_pixels)
    if form == "WEBP":
        check_pixels(webp_size(data) or (0, 0), form, max_pixels)
    else:
        check_png_chunks(data)
    with PngImageFile(io.BytesIO(data)) if form == "PNG" else WebPImageFile(io.BytesIO(data)) as image:
        check_pixels(image.size, form, max_pixels)
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise InvalidInput(f"this {form} file is an animation of {frames} frames, expected a single image")
        return to_rgb(image)


def decode_jpeg(data: bytes, max_pixels: int | None) -> Image.Image:
    """As `decode`. Raises OSError for a truncated file."""
    scans = jpeg_scans(data, MAX_SCANS)
    if scans.count > MAX_SCANS:
        raise InvalidInput(f"this JPEG file has more than {MAX_SCANS} scans")
    if scans.ended:
        return decode_scans(data, scans.count, max_pixels)
    # libjpeg makes up what is missing before an end mark. Pixels that depend on what follows the data are missing ones.
    image = decode_scans(data + b"\xff\xd9", scans.count, max_pixels)
    digest = hashlib.sha256(image.tobytes()).digest()
    other = decode_scans(data + b"\x5a\xc3" * 64 + b"\xff\xd9", scans.count, max_pixels)
    if hashlib.sha256(other.tobytes()).digest() != digest:
        raise OSError("truncated")
    return image


def decode_scans(data: bytes, scans: int, max_pixels: int | None) -> Image.Image:
    """A complete JPEG as an upright RGB image, at reduced scale if it is large."""
    with JpegImageFile(io.BytesIO(data)) as image:
        buffered = scans > 1 or "progressive" in image.info
        check_pixels(image.size, "progressive JPEG" if buffered else "JPEG", max_pixels)
        given = image.size
        factor = next(
            (factor for factor in (1, 2, 4) if image.width * image.height <= FULL_SCALE_PIXELS * factor**2), 8
        )
        if factor > 1:
            image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
        return to_rgb(image, given)


def check_pixels(size: tuple[int, int], kind: str, max_pixels: int | None) -> None:
    """Raises InvalidInput when an image of this size needs more than MAX_DECODE_BYTES or has more than `max_pixels`."""
    width, height = size
    most = MAX_DECODE_BYTES // BYTES_PER_PIXEL[kind]
    if max_pixels is not None:
        most = min(most, max_pixels)
    if not width or not height:
        raise InvalidInput(f"image has {width}x{height} pixels")
    if width * height > most:
        raise InvalidInput(f"image has {width}x{height} pixels, at most {most} are accepted of a {kind} file")


def to_rgb(image: Image.Image, given: tuple[int, int] | None = None) -> Image.Image:
    """A new RGB image: 8 bits a channel, transparency composited on BACKGROUND, turned upright by its EXIF orientation.

    An image of more than FULL_SCALE_PIXELS is reduced. `given`: the photo's size where `image` is decoded at a smaller
    scale; `given_size` of the result says it, upright. Raises InvalidInput for floating-point pixels.
    """
    image.load()
    width, height = given or image.size
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    eight = eight_bits(image)
    if eight.has_transparency_data:
        eight = eight.convert("RGBA")
    elif eight.mode != "RGB":
        eight = eight.convert("RGB")
    if (factor := math.ceil(math.sqrt(eight.width * eight.height / FULL_SCALE_PIXELS))) > 1:
        eight = eight.reduce(factor)
    if eight.mode == "RGBA":
        opaque = Image.new("RGB", eight.size, BACKGROUND)
        opaque.paste(eight, mask=eight.getchannel("A"))
        eight = opaque
    if turn is not None:
        eight = eight.transpose(turn)
    upright = eight.copy() if eight is image else eight
    upright.info[GIVEN_SIZE] = (height, width) if turn in SIDEWAYS else (width, height)
    return upright


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel. Greys of more bits keep the upper 8 of the 8, 10, 12, 14 or 16 that they use."""
    if image.mode == "F":
        raise InvalidInput("image has floating-point pixels, expected 8 or 16 bits a channel")
    if not image.mode.startswith("I"):
        return image
    grey_HW = np.asarray(image)
    if grey_HW.dtype.itemsize > 2:
        grey_HW = grey_HW.clip(0, 0xFFFF).astype(np.uint16)
    bits = int(grey_HW.max()).bit_length()
    shift = max(0, bits + bits % 2 - 8)
    return Image.fromarray((grey_HW >> shift).astype(np.uint8))


def encode_image(image: Image.Image, form: FileFormat, quality: int) -> bytes:
    """The image as a file of the given format."""
    buffer = io.BytesIO()
    image.save(buffer, form.upper(), quality=quality)
    return buffer.getvalue()


def encode_whole(image: Image.Image, resize: int, form: FileFormat, quality: int, fit: Fit = "crop") -> bytes:
    """An RGB photo as a device sends it whole: no larger than `Preprocessing` says, one channel if it is grey."""
    small = shrink(image, resize, fit)
    return encode_image(small.convert("L") if is_grey(small) else small, form, quality)


def is_grey(image: Image.Image) -> bool:
    """Whether the three channels of an RGB image are equal everywhere."""
    pixels_HW3 = np.asarray(image)
    return bool((pixels_HW3 == pixels_HW3[..., :1]).all())


def shrink(image: Image.Image, pixels: int, fit: Fit = "crop") -> Image.Image:
    """The image scaled so that its shorter side, for a letterbox its longer, has at most `pixels`, proportions kept."""
    governing = max(image.size) if fit == "letterbox" else min(image.size)
    if governing <= pixels:
        return image
    least = 1 if fit == "letterbox" else pixels
    width, height = (max(least, round(side * pixels / governing)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


@dataclass(frozen=True, slots=True)
class View:
    """How an input of `crop` (height, width) shows a photo: `fit` and `resize` as in `Preprocessing`."""

    resize: int
    crop: tuple[int, int]
    fit: Fit = "crop"
    fill: tuple[int, int, int] = (0, 0, 0)  # of what a letterbox leaves empty

    @classmethod
    def of(cls, spec: Preprocessing) -> View:
        """What a bundle's preprocessing says."""
        red, green, blue = (min(max(round(255 * mean), 0), 255) for mean in spec.mean)
        return cls(spec.resize, spec.crop, spec.fit, (red, green, blue))


def preprocess(image: Image.Image, spec: Preprocessing) -> NDArray[np.float32]:
    """RGB image -> float32 array of shape (3, crop height, crop width)."""
    return normalise(fitted(image, View.of(spec)), spec)


def fitted(image: Image.Image, view: View) -> NDArray[np.uint8]:
    """An RGB image as a network sees it: (H, W, 3)."""
    if view.fit != "letterbox":
        return crop(image, view)
    height, width = view.crop
    at = placement(view.fit, view.resize, view.crop, image.size)
    canvas = Image.new("RGB", (width, height), view.fill)
    canvas.paste(image.resize((at.width, at.height), Image.Resampling.BILINEAR), (at.left, at.top))
    return np.asarray(canvas)


def crop(image: Image.Image, view: View) -> NDArray[np.uint8]:
    """An input that the photo covers, (H, W, 3)."""
    height, width = view.crop
    at = placement(view.fit, view.resize, view.crop, image.size)
    across, down = image.width / at.width, image.height / at.height
    # Only the crop is resized: a 1 x 65,535 photo would grow to gigabytes if it were scaled as a whole.
    left, top = -at.left, -at.top
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box))


def geometry(image: Image.Image, spec: Preprocessing) -> Geometry:
    """From pixels of the network's input back to those of the photo that `open_image` or `to_rgb` read."""
    return Geometry(placement(spec.fit, spec.resize, spec.crop, image.size), *given_size(image))


def given_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the upright photo, of which `image` may be a reduced copy."""
    size: tuple[int, int] = image.info.get(GIVEN_SIZE, image.size)
    return size


def normalise(pixels_HW3: NDArray[np.uint8], spec: Preprocessing) -> NDArray[np.float32]:
    """Pixels of a crop -> the network's input (3, H, W)."""
    mean, deviation = np.array(spec.mean, np.float32), np.array(spec.deviation, np.float32)
    return np.ascontiguousarray(
        ((pixels_HW3.astype(np.float32) / np.float32(255) - mean) / deviation).transpose(2, 0, 1)
    )
