"""Answered frames as JPEG files with their answers drawn; of each camera the newest are own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from isthmus.edge_agent.streams.frames import Frame
from isthmus.models.errors import InvalidInput

QUALITY = 85
COLOUR, SHADE = (255, 214, 10), (0, 0, 0)
MARGIN = 4  # pixels around a text


class Pictures:
    """`CAMERA-00000042.jpg` in the folder. Raises InvalidInput if it cannot be made."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._files: dict[str, deque[Path]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"{folder}: {error.strerror}") from error

    def __call__(self, item: tuple[Frame, Image.Image]) -> None:
        """Raises OSError."""
        frame, image = item
        path = self._folder / f"{frame.camera}-{frame.index:08d}.jpg"
        annotated(image, (frame.answer or {}).get("answers", {})).save(path, "JPEG", quality=QUALITY)
        own = self._of(frame.camera)
        if path not in own:
            own.append(path)
        while len(own) > self._keep:
            own.popleft().unlink(missing_ok=True)

    def _of(self, camera: str) -> deque[Path]:
        """Files of this camera, oldest first, those of earlier runs included."""
        if camera not in self._files:
            own = (
                path for path in self._folder.glob(f"{camera}-*.jpg") if path.stem.removeprefix(f"{camera}-").isdigit()
            )
            self._files[camera] = deque(sorted(own))
        return self._files[camera]


def annotated(image: Image.Image, answers: Mapping[str, Any]) -> Image.Image:
    """A copy with labels in the corner, and boxes where there are any."""
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    size = max(10, min(image.size) // 24)
    for row, text in enumerate(titles(answers)):
        label(pen, (MARGIN, MARGIN + row * (size + 2 * MARGIN)), text, size)
    for answer in answers.values():
        for box in answer.get("detections", ()):
            left, top, right, bottom = box["box"]
            pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=COLOUR, width=max(1, size // 8))
            label(pen, (left, max(0, top - size)), f"{box['label']} {box['score']:.0%}", size)
    return drawn


def titles(answers: Mapping[str, Any]) -> Iterator[str]:
    for task, answer in answers.items():
        if "label" in answer:
            sure = f" {answer['confidence']:.0%}" if "confidence" in answer else ""
            yield f"{task}: {answer['label']}{sure}" if len(answers) > 1 else f"{answer['label']}{sure}"


def label(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int) -> None:
    left, top, right, bottom = pen.textbbox(at, text, font_size=size)
    pen.rectangle((left - MARGIN / 2, top - MARGIN / 2, right + MARGIN / 2, bottom + MARGIN / 2), fill=SHADE)
    pen.text(at, text, fill=COLOUR, font_size=size)
