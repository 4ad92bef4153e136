"""Pictures and feature maps as HEVC intra frames by x265, through PyAV (`pip install av`, which is not a dependency).

The second is the anchor of feature coding for machines (MPEG's FCTM in outline): channels side by side in one grey
frame of 10 bits, scaled by the least and the greatest value, coded as a picture.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUIET = "log-level=none:info=0:pools=1:frame-threads=1"
HEADER_BYTES = 8  # least and greatest value of a packed frame, float32
TOP = 1023  # of 10 bits


def encode(pixels: NDArray[Any], kind: str, stored: str, crf: int) -> bytes:
    """One intra frame as an HEVC byte stream; `kind` and `stored` are pixel formats of FFmpeg."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="hevc") as container:
        stream = container.add_stream("libx265", rate=1)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], stored
        stream.options = {"crf": str(crf), "preset": "medium", "x265-params": QUIET}
        frame = av.VideoFrame.from_ndarray(pixels, format=kind)
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return buffer.getvalue()


def decode(data: bytes, kind: str) -> NDArray[Any]:
    """The frame of a byte stream."""
    import av

    with av.open(io.BytesIO(data), format="hevc") as container:
        found: NDArray[Any] = next(container.decode(video=0)).to_ndarray(format=kind)
    return found


def even(pixels_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """With the last row and column repeated where their number is odd: chroma has half of them."""
    height, width = pixels_HW3.shape[:2]
    return np.pad(pixels_HW3, ((0, height % 2), (0, width % 2), (0, 0)), "edge")


def picture(pixels_HW3: NDArray[np.uint8], crf: int) -> tuple[int, NDArray[np.uint8]]:
    """Bytes of an RGB picture, and the picture that comes back."""
    data = encode(even(pixels_HW3), "rgb24", "yuv420p", crf)
    height, width = pixels_HW3.shape[:2]
    return len(data), decode(data, "rgb24")[:height, :width]


def tiled(latent_CHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Channels side by side, in a grid as square as can be, of even sides."""
    channels, height, width = latent_CHW.shape
    across = math.ceil(math.sqrt(channels))
    down = -(-channels // across)
    padded = np.pad(latent_CHW, ((0, across * down - channels), (0, 0), (0, 0)))
    grid = padded.reshape(down, across, height, width).transpose(0, 2, 1, 3).reshape(down * height, across * width)
    return np.pad(grid, ((0, grid.shape[0] % 2), (0, grid.shape[1] % 2)))


def untiled(grid_HW: NDArray[np.float32], shape_CHW: tuple[int, int, int]) -> NDArray[np.float32]:
    """The inverse of `tiled`."""
    channels, height, width = shape_CHW
    across = math.ceil(math.sqrt(channels))
    down = -(-channels // across)
    cut = grid_HW[: down * height, : across * width]
    maps = cut.reshape(down, height, across, width).transpose(0, 2, 1, 3).reshape(-1, height, width)
    return maps[:channels]


def features(latent_CHW: NDArray[np.float32], crf: int) -> tuple[int, NDArray[np.float32]]:
    """Bytes of feature maps packed into a frame, and the maps that come back."""
    grid = tiled(latent_CHW)
    low, high = float(grid.min()), float(grid.max())
    step = max(high - low, 1e-6) / TOP
    data = encode(np.rint((grid - low) / step).astype(np.uint16), "gray10le", "gray10le", crf)
    back = decode(data, "gray10le").astype(np.float32) * step + low
    shape: tuple[int, int, int] = latent_CHW.shape  # type: ignore[assignment]
    return len(data) + HEADER_BYTES, untiled(back.astype(np.float32), shape)
