"""Prometheus metrics of requests and of the vision wing. The registry is passed in; labels are few and bounded."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from isthmus.cloud_service import handshakes
from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.models.errors import IsthmusError, PayloadCorrupt, PayloadTooLarge, UnsupportedVersion
from isthmus.models.messages import BundleInfo

LATENCY_BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
METHODS = ("Infer", "InferStream", "Generate", "Describe")
IMAGE = "(image)"  # in place of a tap's name, which has no brackets
REJECTIONS = ("queue", "deadline", "draining", "calls", "quota")
# Of handshakes, then of calls.
AUTH_FAILURES = (*handshakes.REASONS, "no_token", "wrong_token", "revoked")
DECODE_FAILURES: dict[type[IsthmusError], str] = {
    PayloadCorrupt: "corrupt",
    PayloadTooLarge: "too_large",
    UnsupportedVersion: "version",
}

log = logging.getLogger("isthmus.cloud")


class CloudMetrics:
    """One instance a service. Every name starts with isthmus_."""

    def __init__(self, registry: CollectorRegistry, bundles: Sequence[BundleInfo]) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"isthmus_cloud_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str, label: str) -> Histogram:
            full = f"isthmus_cloud_{name}_seconds"
            return Histogram(full, text, [label], buckets=LATENCY_BUCKETS, registry=registry)

        self._requests = counter("requests", "Requests answered, by gRPC code.", "method", "code")
        self._duration = seconds("request_duration", "From the arrival of a request to its response.", "method")
        self._queue_wait = seconds("queue_wait", "How long inputs waited for a batch.", "model")
        self._compute = seconds("compute_duration", "Decoding one batch and running the tail on it.", "model")
        self._batch_size = Histogram(
            "isthmus_cloud_batch_size", "Inputs in each batch.", ["model"], buckets=BATCH_BUCKETS, registry=registry
        )
        self._depth = Gauge("isthmus_cloud_queue_depth", "Inputs waiting for a batch.", registry=registry)
        self._queued = Gauge(
            "isthmus_cloud_queued_bytes",
            "Bytes of payloads, answers and texts of sessions that are held.",
            registry=registry,
        )
        self._inflight = Gauge("isthmus_cloud_inflight_requests", "Requests being answered.", registry=registry)
        self._rejected = counter(
            "requests_rejected",
            "Inputs refused before they were computed: queue full or too long, deadline passed, draining, many calls,"
            " a device's quota.",
            "reason",
        )
        expired = "Inputs with too little time left in the queue (not computed), or late after they were computed."
        self._expired = counter("expired_work", expired, "stage")
        self._auth = counter(
            "auth_failures",
            "Devices that could not show who they are: TLS handshakes that failed, and calls that were refused.",
            "reason",
        )
        self._not_after = Gauge(
            "isthmus_tls_certificate_not_after_timestamp_seconds",
            "When the service's certificate expires, seconds since 1970; 0 without TLS.",
            registry=registry,
        )
        self._decode = counter("decode_failures", "Payloads that could not be decoded.", "reason")
        self._inputs = counter("inputs", "Inputs computed, by tap.", "model", "tap")
        self._tasks = counter("task_answers", "Predictions, by requested task.", "model", "task")
        build = Gauge("isthmus_build_info", "Software version.", ["version"], registry=registry)
        build.labels(version("isthmus")).set(1)
        held = Gauge("isthmus_model_info", "Bundles that are served.", ["model", "version"], registry=registry)
        for bundle in bundles:
            held.labels(bundle.name, bundle.fingerprint.hex()[:12]).set(1)
        self._start_at_zero(bundles)

    def answered(self, method: str, code: str, duration_s: float) -> None:
        self._requests.labels(method, code).inc()
        self._duration.labels(method).observe(duration_s)

    def started(self) -> None:
        self._inflight.inc()

    def ended(self) -> None:
        self._inflight.dec()

    def batch(self, model: str, queued_s: Sequence[float], compute_s: float) -> None:
        for waited_s in queued_s:
            self._queue_wait.labels(model).observe(waited_s)
        self._compute.labels(model).observe(compute_s)
        self._batch_size.labels(model).observe(len(queued_s))

    def computed(self, bundle: BundleInfo, tap: int | None, tasks: Sequence[int], count: int) -> None:
        """A batch of `count` inputs of `tap`, or of whole images (None), predicted each of `tasks`."""
        self._inputs.labels(bundle.name, IMAGE if tap is None else bundle.taps[tap].name).inc(count)
        for task in tasks:
            self._tasks.labels(bundle.name, bundle.tasks[task].name).inc(count)

    def queue_depth(self, depth: int) -> None:
        self._depth.set(depth)

    def watch(self, queue: ByteBudget) -> None:
        """Export the bytes that `queue` holds."""
        self._queued.set_function(lambda: queue.held_bytes)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def auth_failed(self, reason: str) -> None:
        """Safe to call from any thread."""
        self._auth.labels(reason).inc()

    def watch_certificate(self, not_after_s: Callable[[], float]) -> None:
        """Export when the certificate in use expires."""
        self._not_after.set_function(not_after_s)

    def expired(self, stage: str) -> None:
        self._expired.labels(stage).inc()

    def unreadable(self, error: IsthmusError, *, on_arrival: bool) -> None:
        """A payload could not be decoded. On arrival, corruption means that the checksum did not match."""
        reason = DECODE_FAILURES.get(type(error))
        if reason is not None:
            self._decode.labels("checksum" if on_arrival and reason == "corrupt" else reason).inc()

    def log_failure(self, what: str) -> None:
        """Log a fault of the service with its traceback, if there is one, which devices never see."""
        log.error(what, exc_info=sys.exc_info()[0] is not None)

    def _start_at_zero(self, bundles: Sequence[BundleInfo]) -> None:
        """Known labels exist from the start, so that a first failure is an increase and not a new series."""
        for bundle in bundles:
            for family in (self._queue_wait, self._compute, self._batch_size):
                family.labels(bundle.name)
            for tap in (IMAGE, *(tap.name for tap in bundle.taps)):
                self._inputs.labels(bundle.name, tap)
            for task in bundle.tasks:
                self._tasks.labels(bundle.name, task.name)
        for method in METHODS:
            self._requests.labels(method, "OK")
            self._duration.labels(method)
        for reason in REJECTIONS:
            self._rejected.labels(reason)
        for reason in AUTH_FAILURES:
            self._auth.labels(reason)
        for stage in ("queue", "compute"):
            self._expired.labels(stage)
        for reason in ("checksum", *DECODE_FAILURES.values()):
            self._decode.labels(reason)
