"""What the agent exports to Prometheus. The registry is passed in; labels are few and bounded."""

from __future__ import annotations

from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from isthmus.edge_agent.policy.breaker import STATES
from isthmus.edge_agent.transport.link import Link
from isthmus.edge_agent.vision.result import Answer
from isthmus.models.vision.manifest import Manifest

LATENCY_BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10)
CONFIDENCE_BUCKETS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
SIZE_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ROUTES = ("exit", "split", "offload", "fallback")
REASONS = ("cloud_down", "deadline", "rejected", "too_large")


class EdgeMetrics:
    """One instance an agent; every name starts with isthmus_."""

    def __init__(self, registry: CollectorRegistry, manifest: Manifest) -> None:
        self._model = manifest.name
        self._requests = Counter(
            "isthmus_edge_requests", "Photos, by who answered.", ["route", "outcome", "model"], registry=registry
        )
        self._duration = Histogram(
            "isthmus_edge_request_duration_seconds",
            "From photo to answer.",
            ["route"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._exits = Counter("isthmus_edge_exits", "Answers by exit.", ["model", "exit"], registry=registry)
        self._confidence = Histogram(
            "isthmus_edge_exit_confidence_ratio",
            "Confidence of each exit passed.",
            ["model", "exit"],
            buckets=CONFIDENCE_BUCKETS,
            registry=registry,
        )
        self._bytes = Counter(
            "isthmus_edge_offload_bytes", "Message bytes, gRPC prefix included.", ["direction"], registry=registry
        )
        self._size = Histogram(
            "isthmus_edge_bottleneck_size_bytes",
            "Entropy-coded size of a latent, framing left out.",
            ["model"],
            buckets=SIZE_BUCKETS,
            registry=registry,
        )
        self._points = Counter(
            "isthmus_edge_bottlenecks",
            "Latents encoded, by operating point.",
            ["model", "tap", "width", "rate"],
            registry=registry,
        )
        self._missing = Counter(
            "isthmus_edge_missing_answers", "Tasks that went unanswered without a cloud.", ["task"], registry=registry
        )
        self._head = self._stage("head", "Trunk and exits.", registry)
        self._encode = self._stage("encode", "Encoder and entropy coder, or image codec.", registry)
        self._degraded = Counter(
            "isthmus_edge_degraded_responses", "Answers below the owner's quality.", ["reason"], registry=registry
        )
        self._breaker = Gauge(
            "isthmus_edge_circuit_breaker_state", "1 for the state it is in.", ["state"], registry=registry
        )
        self._late = Counter("isthmus_edge_late_responses", "Cloud answers after their deadline.", registry=registry)
        self._rtt = Gauge("isthmus_edge_link_rtt_seconds", "Estimated round trip.", registry=registry)
        self._throughput = Gauge(
            "isthmus_edge_link_throughput_bytes_per_second", "Estimated uplink bandwidth.", registry=registry
        )
        Gauge("isthmus_build_info", "Software version.", ["version"], registry=registry).labels(version("isthmus")).set(
            1
        )
        model_info = Gauge("isthmus_model_info", "Bundle in use.", ["model", "version"], registry=registry)
        model_info.labels(manifest.name, manifest.fingerprint[:12]).set(1)
        self._start_at_zero(manifest)

    def answered(self, answer: Answer) -> None:
        """One finished photo."""
        for task in answer.missing:
            self._missing.labels(task).inc()
        self._requests.labels(answer.route, "ok", self._model).inc()
        self._duration.labels(answer.route).observe(answer.stage_ms["total"] / 1000)
        if answer.exit is not None:
            self._exits.labels(self._model, answer.exit).inc()
        self._bytes.labels("sent").inc(answer.bytes_up)
        self._bytes.labels("received").inc(answer.bytes_down)
        for family, name in ((self._head, "head"), (self._encode, "encode")):
            if name in answer.stage_ms:
                family.labels(self._model).observe(answer.stage_ms[name] / 1000)

    def refused(self) -> None:
        """A photo that could not be read."""
        self._requests.labels("exit", "error", self._model).inc()

    def passed(self, exit_name: str, confidence: float) -> None:
        self._confidence.labels(self._model, exit_name).observe(confidence)

    def encoded(self, size: int, tap: str, width: float, rate: int) -> None:
        """One latent of `size` bytes, coded at an operating point."""
        self._size.labels(self._model).observe(size)
        self._points.labels(self._model, tap, f"{width:g}", rate).inc()

    def degraded(self, reason: str) -> None:
        self._degraded.labels(reason).inc()

    def late(self) -> None:
        self._late.inc()

    def link(self, link: Link | None) -> None:
        """State and estimates of the link; without one nothing is exported."""
        if link is None:
            return
        state, estimate = link.state, link.estimate
        for name in STATES:
            self._breaker.labels(name).set(name == state)
        self._rtt.set(estimate.rtt_s)
        self._throughput.set(estimate.bytes_per_s)

    def _stage(self, name: str, text: str, registry: CollectorRegistry) -> Histogram:
        full = f"isthmus_edge_{name}_duration_seconds"
        return Histogram(full, text, ["model"], buckets=LATENCY_BUCKETS, registry=registry)

    def _start_at_zero(self, manifest: Manifest) -> None:
        for route in ROUTES:
            self._requests.labels(route, "ok", self._model)
            self._duration.labels(route)
        self._requests.labels("exit", "error", self._model)
        for exit_ in manifest.heads["fp32"].exits:  # named alike at every precision
            self._exits.labels(self._model, exit_.name)
            self._confidence.labels(self._model, exit_.name)
        for task in manifest.tasks[1:]:  # every exit knows the first
            self._missing.labels(task.name)
        for tap in manifest.taps:
            for width in tap.widths:
                for rate in range(len(width.rates)):
                    self._points.labels(self._model, tap.name, f"{width.width:g}", rate)
        for direction in ("sent", "received"):
            self._bytes.labels(direction)
        for reason in REASONS:
            self._degraded.labels(reason)
        for family in (self._size, self._head, self._encode):
            family.labels(self._model)
