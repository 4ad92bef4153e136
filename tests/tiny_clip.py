"""Tiny video files, made with PyAV, and a server of MJPEG."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
from PIL import Image


def scenes(*lengths: int, size: tuple[int, int] = (96, 64)) -> list[Image.Image]:
    """So many equal frames of each scene; scenes differ much."""
    frames: list[Image.Image] = []
    for seed, length in enumerate(lengths):
        small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
        frames += [Image.fromarray(small).resize(size, Image.Resampling.NEAREST)] * length
    return frames


def write_clip(path: Path, frames: Sequence[Image.Image], rate: int = 10) -> Path:
    """A video file of these frames, nearly without loss."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.codec_context.qmin, stream.codec_context.qmax = "yuv420p", 2, 2
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return path


@contextmanager
def mjpeg_server(frames: Sequence[Image.Image], password: str = "") -> Iterator[str]:
    """The URL of a camera that gives these frames at once, and then ends; again for each connection."""

    class Camera(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for frame in frames:
                data = io.BytesIO()
                frame.save(data, "JPEG")
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {data.tell()}\r\n\r\n"
                self.wfile.write(head.encode() + data.getvalue() + b"\r\n")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{f'user:{password}@' if password else ''}127.0.0.1:{server.server_port}/stream.mjpg"
    finally:
        server.shutdown()
        server.server_close()
