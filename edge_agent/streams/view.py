"""What every camera last answered, for whoever looks: the newest frame only, drawn once however many ask for it."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from isthmus.edge_agent.streams.frames import Frame
from isthmus.edge_agent.streams.sinks.pictures import annotated

MAX_SIDE = 960  # pixels of a picture; a larger frame is made smaller
QUALITY = 80


@dataclass
class Shown:
    """One answered frame. `data`: its JPEG, once somebody has asked for it."""

    index: int
    image: Image.Image
    line: dict[str, Any]
    data: bytes | None = None


class StreamView:
    """Safe to call from several threads. Nobody who looks holds up a camera."""

    def __init__(self, totals: Callable[[], dict[str, dict[str, Any]]]) -> None:
        """`totals`: counts of outcomes, uploads and bytes of each camera."""
        self._totals = totals
        self._shown: dict[str, Shown] = {}
        self._drawing = threading.Lock()

    @property
    def cameras(self) -> list[str]:
        return list(self._totals())

    def put(self, frame: Frame, line: dict[str, Any]) -> None:
        """A frame was answered."""
        if frame.image is not None:
            self._shown[frame.camera] = Shown(frame.index, frame.image, line)

    def status(self) -> list[dict[str, Any]]:
        """Of each camera: its counts, and `last`, the line of results of its last answered frame."""
        found = []
        for camera, counts in self._totals().items():
            shown = self._shown.get(camera)
            found.append({"camera": camera, **counts, "last": shown.line if shown else None})
        return found

    def picture(self, camera: str) -> tuple[int, bytes] | None:
        """The index and the JPEG of the last answered frame with its answers drawn; None without one."""
        shown = self._shown.get(camera)
        if shown is None:
            return None
        with self._drawing:
            if shown.data is None:
                shown.data = jpeg(shown)
        return shown.index, shown.data


def jpeg(shown: Shown) -> bytes:
    drawn, file = annotated(shown.image, shown.line["answers"]), io.BytesIO()
    drawn.thumbnail((MAX_SIDE, MAX_SIDE))
    drawn.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
