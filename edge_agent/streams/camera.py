"""One camera: source -> frames per second -> change gate -> agent, several frames under way -> the account of frames.

A source that ends or fails is opened again after a random wait; nothing that happens to one camera ends another.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, Protocol

from PIL import Image

from isthmus.edge_agent.streams.answers import as_json
from isthmus.edge_agent.streams.config import StreamConfig
from isthmus.edge_agent.streams.frames import Frame, FrameLog
from isthmus.edge_agent.streams.gate import ChangeGate, thumbnail
from isthmus.edge_agent.streams.sources import FrameRate, Shot, Source
from isthmus.edge_agent.vision.live import Dropped
from isthmus.models.errors import AgentClosed, InvalidInput, IsthmusError

log = logging.getLogger("isthmus.streams")

IN_FLIGHT = 8  # frames sent and not answered while a source waits; the agent has room for more
FIRST_WAIT_S = 1.0  # the longest before the first opening anew; it doubles up to `reconnect_s`
POLL_S = 0.05
ENDED = "what answers it failed, or the agent ended"
MOST_FAULTS = 5  # of the agent in a row, after which a file is given up


class Agent(Protocol):
    """An agent for photos, as far as a camera uses it."""

    def infer_many(self, photos: Iterable[Image.Image], *, when_full: Any) -> Iterator[Any]: ...


class Camera:
    """Runs one source. `after`: the last frame that an earlier run has accounted for; -1 for none."""

    def __init__(
        self,
        source: Source,
        config: StreamConfig,
        report: Callable[[Frame], None],
        *,
        threshold: float | None,
        stop: threading.Event,
        after: int = -1,
        keep_images: bool = False,
        on_reopen: Callable[[str], None] = lambda why: None,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.source, self._config, self._stop = source, config, stop
        self._log = FrameLog(report, config.max_age_s)
        self._gate = ChangeGate(threshold, config.reuse.most_s)
        self._reference: Frame | None = None  # that the gate compares with
        self._keep_images, self._on_reopen, self._jitter = keep_images, on_reopen, jitter
        self._when_full = config.when_full or ("drop_oldest" if source.live else "block")
        self._after = after
        self._next = after + 1 if source.endless else 0  # index of the next frame
        self._rate = FrameRate(config.fps)
        self.problem: str | None = None  # why it ended early

    def run(self, agent: Agent) -> None:
        """Watch until the source ends, or `stop`."""
        attempt = 0
        while not self._stop.is_set():
            began, fault = self._next, self._pass(agent)
            if isinstance(fault, AgentClosed):
                return
            attempt = 1 if self._next > began else attempt + 1
            if self._is_over(fault, attempt) or self._stop.is_set():
                return
            why = str(fault) if fault else "it ended"
            log.warning("camera %s: %s; it is opened again", self.source.name, why)
            self._on_reopen(why)
            self._stop.wait(self.wait_s(attempt))

    def wait_s(self, attempt: int) -> float:
        """Full jitter: cameras that failed together are not opened together."""
        most_s = min(self._config.reconnect_s, FIRST_WAIT_S * 2 ** min(attempt - 1, 20))
        return self._jitter(0.0, most_s)

    def _is_over(self, fault: IsthmusError | None, attempt: int) -> bool:
        """Whether it is not opened again; then `problem` says why, unless it has simply ended."""
        if self.source.endless:
            again = self._config.reconnect_s > 0
        else:  # a file goes on after a fault of what answers; a fault of its own stays
            again = fault is not None and not isinstance(fault, InvalidInput) and attempt < MOST_FAULTS
        if not again and (fault is not None or self.source.endless):
            self.problem = str(fault) if fault else "it ended"
        return not again

    def _pass(self, agent: Agent) -> IsthmusError | None:
        """One opening of the source, to its end. What ended it, if that was an error."""
        self._gate.forget()
        self._rate, over = FrameRate(self._config.fps), threading.Event()
        if not self.source.endless:
            self._after, self._next = max(self._after, self._next - 1), 0
        policy = "drop_newest" if self._when_full == "block" else self._when_full  # nothing is dropped: frames wait
        photos = self._photos(over)
        try:
            with closing(agent.infer_many(photos, when_full=policy)) as results:  # type: ignore[type-var]
                for result in results:
                    if isinstance(result, Dropped):
                        self._log.dropped(result.count)
                    else:
                        self._log.answered(as_json(result))
        except IsthmusError as error:
            return error
        finally:
            over.set()
            end_reading(photos)
            self._log.fail_all(ENDED)
        return None

    def _photos(self, over: threading.Event) -> Generator[Image.Image, None, None]:
        """The images that the agent gets; every other frame is settled here."""
        for shot in self.source.shots():
            if over.is_set() or self._stop.is_set():
                return
            index, self._next = self._next, self._next + 1
            if index <= self._after:
                continue
            frame = Frame(self.source.name, index, shot.at_s)
            image = self._look(frame, shot)
            if image is None:
                continue
            if self._when_full == "block":
                self._log.wait_for_room(IN_FLIGHT, lambda: over.is_set() or self._stop.is_set())
            if over.is_set():
                self._log.settle(frame, "failed", ENDED)
                return
            frame.image = image if self._keep_images else None
            self._log.send(frame)
            yield image

    def _look(self, frame: Frame, shot: Shot) -> Image.Image | None:
        """The frame's image if the agent is to answer it; otherwise it is settled."""
        if not self._rate.takes(frame.at_s):
            self._log.settle(frame, "filtered", "more frames a second than are looked at")
            return None
        try:
            image = shot.decode()
        except IsthmusError as error:
            self._log.settle(frame, "failed", str(error))
            return None
        small_HW = thumbnail(image)
        frame.change = self._gate.measure(small_HW)
        reference = self._reference
        if reference and reference.usable and self._gate.reuses(frame.change, frame.at_s):
            self._log.repeat(frame, reference)
            return None
        self._gate.refer(small_HW, frame.at_s)
        self._reference = frame
        return image


def end_reading(photos: Generator[Any, None, None]) -> None:
    """Returns when no thread reads from it any more; one that does waits for a packet, for READ_S at most."""
    while True:
        try:
            return photos.close()
        except ValueError:  # it is being executed
            time.sleep(POLL_S)
