"""The process that decodes devices' images: files come in on stdin, pixels go out on stdout. Imports no PyTorch.

    READY   REQUEST file -> REPLY pixels or words   REQUEST file -> ...

`decoding` starts it, and kills it when an image takes too long. It ends when its stdin is closed.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import InvalidInput, Overloaded
from isthmus.models.vision.images import FITS, MAX_DECODE_BYTES, View, fitted, open_image

Pixels = NDArray[np.uint8]

READY = b"R"
REQUEST = struct.Struct("<5I4B")  # bytes of the file, then the fields of ImageInput and its view; fit indexes FITS
REPLY = struct.Struct("<BI")  # index into OUTCOMES, bytes that follow
OUTCOMES = (None, InvalidInput, Overloaded)  # None: the pixels follow, else the words of an error


@dataclass(frozen=True, slots=True)
class ImageInput:
    """How a network sees an image of at most `max_pixels`."""

    max_pixels: int
    view: View

    def pack(self, size: int) -> bytes:
        """The header of a file of `size` bytes."""
        view = self.view
        return REQUEST.pack(size, self.max_pixels, view.resize, *view.crop, FITS.index(view.fit), *view.fill)

    @classmethod
    def unpack(cls, header: bytes) -> tuple[int, ImageInput]:
        """The size of the file that follows, and how it is seen."""
        size, max_pixels, resize, height, width, fit, *fill = REQUEST.unpack(header)
        red, green, blue = fill
        return size, cls(max_pixels, View(resize, (height, width), FITS[fit], (red, green, blue)))


def decode(data: bytes, spec: ImageInput) -> Pixels:
    """An image file as pixels (H, W, 3). Raises InvalidInput and Overloaded as `open_image` does."""
    try:
        return fitted(open_image(data, spec.max_pixels), spec.view)
    except MemoryError:
        raise Overloaded("not enough memory to decode this image") from None


def main() -> None:
    """Decode until stdin is closed, with MAX_DECODE_BYTES more memory than at the start."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they are sent to the whole group; the service drains and closes stdin
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of a service that was killed: end without a word
    limit_memory()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sink.write(READY)
    sink.flush()
    while header := source.read(REQUEST.size):
        size, spec = ImageInput.unpack(header)
        outcome, body = answer(source.read(size), spec)
        sink.write(REPLY.pack(outcome, len(body)) + body)
        sink.flush()


def limit_memory() -> None:
    """Allow MAX_DECODE_BYTES more than is used now, within a hard limit, which only root can raise."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = used + MAX_DECODE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def answer(data: bytes, spec: ImageInput) -> tuple[int, bytes]:
    """Outcome and bytes of a reply."""
    try:
        return 0, decode(data, spec).tobytes()
    except (InvalidInput, Overloaded) as error:
        return OUTCOMES.index(type(error)), str(error).encode()


if __name__ == "__main__":
    main()
