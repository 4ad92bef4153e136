"""The frames of a clip with their answers, each by the agent as it is set up: what a calibration is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image

from isthmus.edge_agent.streams.answers import as_json
from isthmus.edge_agent.streams.calibration import MOST_FRAMES, Seen
from isthmus.edge_agent.streams.camera import Agent
from isthmus.edge_agent.streams.config import StreamConfig
from isthmus.edge_agent.streams.gate import Bytes, thumbnail
from isthmus.edge_agent.streams.sources import FrameRate, Source
from isthmus.models.errors import InvalidInput


def seen_by(agent: Agent, source: Source, config: StreamConfig) -> list[Seen]:
    """Frames that cannot be decoded are left out, and those that `fps` leaves out. Raises IsthmusError."""
    read: list[tuple[float, Bytes]] = []

    def images() -> Iterator[Image.Image]:
        frame_rate = FrameRate(config.fps)
        for shot in source.shots():
            if not frame_rate.takes(shot.at_s):
                continue
            if len(read) == MOST_FRAMES:
                raise InvalidInput(f"{source.name}: the clip has more than {MOST_FRAMES} frames; --fps leaves some out")
            try:
                image = shot.decode()
            except InvalidInput:
                continue
            read.append((shot.at_s, thumbnail(image)))
            yield image

    answers = [answered(source, as_json(each)) for each in agent.infer_many(images(), when_full="block")]
    return [Seen(at_s, small_HW, found) for (at_s, small_HW), found in zip(read, answers, strict=True)]


def answered(source: Source, answer: dict[str, Any]) -> dict[str, Any]:
    """Of each task. Raises InvalidInput for one that the device gave in place of the cloud, or not at all."""
    if answer["degraded"] or answer.get("missing"):
        raise InvalidInput(f"{source.name}: the cloud did not answer a frame, so that nothing is certified")
    found: dict[str, Any] = answer["answers"]
    return found
