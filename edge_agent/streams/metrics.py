"""Metrics of watched cameras. Labels: the cameras of the command line, outcomes, sinks."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter

from isthmus.edge_agent.streams.frames import OUTCOMES, Frame

SINKS = ("mqtt", "pictures", "webhook")


class StreamMetrics:
    """One instance per registry."""

    def __init__(self, registry: CollectorRegistry, cameras: Iterable[str], sinks: Iterable[str] = ()) -> None:
        self._frames = Counter(
            "isthmus_edge_stream_frames",
            "Frames of cameras; each has exactly one outcome.",
            ["camera", "outcome"],
            registry=registry,
        )
        self._reconnects = Counter(
            "isthmus_edge_stream_reconnects",
            "Cameras that ended or failed and were opened again.",
            ["camera"],
            registry=registry,
        )
        self._lost = Counter(
            "isthmus_edge_stream_undelivered",
            "Answers that a webhook, a broker or a folder did not take.",
            ["sink"],
            registry=registry,
        )
        for camera in cameras:
            self._reconnects.labels(camera)
            for outcome in OUTCOMES:
                self._frames.labels(camera, outcome)
        for sink in sinks:
            self._lost.labels(sink)

    def frame(self, frame: Frame) -> None:
        """One frame has its outcome."""
        self._frames.labels(frame.camera, frame.outcome).inc()

    def reconnected(self, camera: str) -> None:
        self._reconnects.labels(camera).inc()

    def undelivered(self, sink: str, count: int = 1) -> None:
        self._lost.labels(sink).inc(count)
