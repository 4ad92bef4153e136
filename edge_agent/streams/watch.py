"""Several cameras at once: one agent, one account of frames, one set of sinks.

results (JSON lines)     every frame, and what happens to cameras
MQTT, webhook, pictures  answered frames, in the background
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from isthmus.edge_agent.streams.camera import Agent, Camera
from isthmus.edge_agent.streams.config import StreamConfig
from isthmus.edge_agent.streams.frames import OUTCOMES, Frame
from isthmus.edge_agent.streams.metrics import StreamMetrics
from isthmus.edge_agent.streams.sinks.background import Background
from isthmus.edge_agent.streams.sinks.lines import Lines
from isthmus.edge_agent.streams.sources import Source
from isthmus.edge_agent.streams.view import StreamView
from isthmus.models.errors import InvalidInput

log = logging.getLogger("isthmus.streams")

Deliver = Callable[[Frame, dict[str, Any]], None]


@dataclass
class Totals:
    """Of one camera."""

    outcomes: Counter[str] = field(default_factory=Counter)
    uploads: int = 0
    bytes_up: int = 0

    def add(self, frame: Frame) -> None:
        self.outcomes[str(frame.outcome)] += 1
        if frame.answer is not None and frame.repeats is None:
            self.uploads += frame.answer["bytes_up"] > 0
            self.bytes_up += frame.answer["bytes_up"]

    def as_dict(self) -> dict[str, Any]:
        counts: dict[str, int] = {outcome: self.outcomes[outcome] for outcome in OUTCOMES}
        return {"frames": sum(counts.values()), **counts, "uploads": self.uploads, "bytes_up": self.bytes_up}


class Watch:
    """Watches all sources in threads of their own, until each has ended or `stop` is set."""

    def __init__(
        self,
        sources: Sequence[Source],
        config: StreamConfig,
        metrics: StreamMetrics,
        *,
        model: str,
        thresholds: Mapping[str, float | None],
        after: Mapping[str, int],
    ) -> None:
        """`model`: the bundle's name. By camera: `thresholds` of the gate; `after`, the last frame of an earlier run.

        Raises InvalidInput for a sink that cannot be used.
        """
        self.stop, self.totals = threading.Event(), {source.name: Totals() for source in sources}
        self.problem: str | None = None
        self._metrics, self._lock, self._sinks = metrics, threading.Lock(), ExitStack()
        self.view = StreamView(self._counts)
        self._lines = Lines(config.results)
        self._sinks.callback(self._lines.close)
        try:
            self._deliveries = self._open(config, model)
        except BaseException:
            self._sinks.close()
            raise
        self.cameras = [
            Camera(
                source,
                config,
                self._report,
                threshold=thresholds.get(source.name),
                stop=self.stop,
                after=after.get(source.name, -1),
                keep_images=config.frames_folder is not None or config.view is not None,
                on_reopen=partial(self._reopened, source.name),
            )
            for source in sources
        ]
        self._after = after

    def _open(self, config: StreamConfig, model: str) -> list[Deliver]:
        """The sinks that are asked for, each in a thread of its own."""
        found: list[Deliver] = [self.view.put] if config.view else []
        if config.frames_folder is not None:
            from isthmus.edge_agent.streams.sinks.pictures import Pictures

            pictures = Background("pictures", Pictures(config.frames_folder, config.keep_frames), self._undelivered)
            self._sinks.callback(pictures.close)
            found.append(lambda frame, line: pictures.put((frame, frame.image)) if frame.image else None)
        if config.webhook is not None:
            from isthmus.edge_agent.streams.sinks.webhook import Webhook

            webhook = Background("webhook", Webhook(config.webhook.get_secret_value()), self._undelivered)
            self._sinks.callback(webhook.close)
            found.append(lambda frame, line: webhook.put(line))
        if config.mqtt.broker is not None:
            from isthmus.edge_agent.streams.sinks.mqtt import MqttSink

            sink = MqttSink(config.mqtt.broker, config.mqtt, model)
            self._sinks.callback(sink.close)
            mqtt = Background("mqtt", sink, self._undelivered)
            self._sinks.callback(mqtt.close)
            found.append(lambda frame, line: mqtt.put(line))
        return found

    def run(self, agent: Agent) -> None:
        """Returns when all cameras have ended and what waits is delivered. `problem` says what ended it early."""
        threads = [
            threading.Thread(target=self._run_one, args=(camera, agent), name=f"isthmus-camera-{camera.source.name}")
            for camera in self.cameras
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._sinks.close()

    def _run_one(self, camera: Camera, agent: Agent) -> None:
        source = camera.source
        after = self._after.get(source.name)
        self._event("start", source.name, source=source.shown, **({} if after is None else {"after": after}))
        try:
            camera.run(agent)
        except Exception as error:  # ours: other cameras go on, and the end says it
            log.exception("camera %s", source.name)
            camera.problem = type(error).__name__
        why = {} if camera.problem is None else {"why": camera.problem}
        self._event("end", source.name, **self.totals[source.name].as_dict(), **why)

    def _report(self, frame: Frame) -> None:
        line = frame.as_dict()
        self._metrics.frame(frame)
        with self._lock:
            self.totals[frame.camera].add(frame)
        self._write(line)
        if frame.fresh:
            for deliver in self._deliveries:
                deliver(frame, line)

    def _reopened(self, camera: str, why: str) -> None:
        self._metrics.reconnected(camera)
        self._event("reconnect", camera, why=why)

    def _event(self, event: str, camera: str, **more: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._write({"event": event, "camera": camera, "time": time, **more})

    def _write(self, line: dict[str, Any]) -> None:
        """Without results there is no account of frames: then all ends."""
        with self._lock:
            if self.problem is not None:
                return
            try:
                self._lines.write(line)
            except InvalidInput as error:
                self.problem = str(error)
                self.stop.set()

    def _counts(self) -> dict[str, dict[str, Any]]:
        with self._lock:
            return {camera: found.as_dict() for camera, found in self.totals.items()}

    def _undelivered(self, sink: str) -> None:
        self._metrics.undelivered(sink)


def summary(totals: Mapping[str, Totals]) -> list[str]:
    """A line a camera, for people."""
    lines = []
    for camera, found in totals.items():
        content = found.as_dict()
        parts = [f"{content[outcome]} {outcome}" for outcome in OUTCOMES if content[outcome]]
        lines.append(
            f"{camera}: {content['frames']} frames: {', '.join(parts) or 'none'};"
            f" {content['uploads']} uploads of {content['bytes_up']} B"
        )
    return lines
