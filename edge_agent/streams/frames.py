"""The account of one camera's frames: each ends in exactly one outcome, and is reported in the order of the frames.

    answered   by the agent: by an exit, the cloud, or in their place
    reused     it changed so little that it has the last answer
    filtered   left out by --fps
    dropped    more frames came than are answered
    late       answered or reused, but after --max-age-ms
    failed     it cannot be decoded, or what answers it failed

Safe to call from the thread that reads frames and the one that reads answers.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from PIL import Image

Outcome = Literal["answered", "reused", "filtered", "dropped", "late", "failed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
SPENT = ("bytes_up", "bytes_down", "stage_ms", "cost_usd", "modelled_joules", "why")  # once, not for each repetition
POLL_S = 0.2


@dataclass
class Frame:
    """One frame, and what became of it. `at_s`: in the time of the source. `repeats`: the frame whose answer it has."""

    camera: str
    index: int
    at_s: float
    read_s: float = field(default_factory=time.monotonic)
    time: datetime = field(default_factory=lambda: datetime.now(UTC))
    outcome: Outcome | None = None
    answer: dict[str, Any] | None = None  # as JSON
    repeats: Frame | None = None
    change: float | None = None
    why: str | None = None
    image: Image.Image | None = None  # until it is reported, where somebody draws on it
    age_s: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether its answer may be taken by another frame: it is on its way, or good."""
        if self.outcome is None:
            return True
        if self.outcome not in ("answered", "late") or self.answer is None:
            return False
        return not (self.answer["degraded"] or self.answer.get("missing"))

    @property
    def fresh(self) -> bool:
        """Whether it has an answer of its own, in time."""
        return self.outcome == "answered"

    def as_dict(self) -> dict[str, Any]:
        """One line of the results; what is empty is left out."""
        line = {
            "camera": self.camera,
            "frame": self.index,
            "time": self.time.isoformat(timespec="milliseconds"),
            "at_s": round(self.at_s, 3),
            "outcome": self.outcome,
            "same_as": self.repeats.index if self.repeats else None,
            "change": None if self.change is None else round(self.change, 4),
            "why": self.why,
            "age_ms": round(1000 * self.age_s, 1),
        }
        answer = self.answer or {}
        if self.repeats:
            answer = {key: value for key, value in answer.items() if key not in SPENT}
        return {key: value for key, value in line.items() if value is not None} | answer


class FrameLog:
    """Frames between their reading and their report. `report` is called for each, in order, by one thread at a time."""

    def __init__(self, report: Callable[[Frame], None], max_age_s: float | None) -> None:
        self._report, self._max_age_s = report, max_age_s
        self._frames: deque[Frame] = deque()  # not reported yet
        self._sent: deque[Frame] = deque()  # to the agent, whose answers come in order
        self._changed = threading.Condition()

    def settle(self, frame: Frame, outcome: Outcome, why: str | None = None) -> None:
        """A frame that is not answered at all."""
        with self._changed:
            self._frames.append(frame)
            self._end(frame, outcome, why)

    def repeat(self, frame: Frame, reference: Frame) -> None:
        """It has the answer of that frame, when there is one."""
        with self._changed:
            frame.repeats = reference
            self._frames.append(frame)
            self._flush()

    def send(self, frame: Frame) -> None:
        """It is the next one that the agent gets."""
        with self._changed:
            self._frames.append(frame)
            self._sent.append(frame)

    def wait_for_room(self, most: int, stopped: Callable[[], bool]) -> None:
        """Until fewer than `most` frames that were sent have no answer yet."""
        with self._changed:
            while len(self._sent) >= most and not stopped():
                self._changed.wait(POLL_S)

    def answered(self, answer: dict[str, Any]) -> None:
        """The first of the frames that were sent."""
        with self._changed:
            frame = self._sent.popleft()
            frame.answer = answer
            self._end(frame, "answered")

    def dropped(self, count: int) -> None:
        """The first `count` of the frames that were sent are not answered."""
        with self._changed:
            for _ in range(count):
                self._end(self._sent.popleft(), "dropped", "more frames came than are answered")

    def fail_all(self, why: str) -> None:
        """Nothing that was sent is answered any more."""
        with self._changed:
            while self._sent:
                self._end(self._sent.popleft(), "failed", why)

    def _end(self, frame: Frame, outcome: Outcome, why: str | None = None) -> None:
        frame.outcome, frame.why = outcome, why
        self._flush()

    def _flush(self) -> None:
        """Report what is known, up to the first frame of which nothing is."""
        while self._frames and self._known(self._frames[0]):
            frame = self._frames.popleft()
            frame.age_s = time.monotonic() - frame.read_s
            if frame.answer is not None and self._max_age_s is not None and frame.age_s > self._max_age_s:
                frame.outcome = "late"
            self._report(frame)
            frame.image = None
        self._changed.notify_all()

    def _known(self, frame: Frame) -> bool:
        """Whether it has its outcome; a frame that repeats another gets it from that one."""
        if frame.outcome is None and frame.repeats is not None and frame.repeats.outcome is not None:
            reference = frame.repeats
            frame.answer = reference.answer
            frame.outcome = "reused" if reference.answer is not None else reference.outcome
            frame.why = None if frame.answer is not None else f"as frame {reference.index}, whose answer it was to have"
        return frame.outcome is not None
