"""What the service exports to Prometheus. The registry is passed in; labels are few and bounded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from models.errors import IsthmusError, PayloadCorrupt, PayloadTooLarge, UnsupportedVersion
from models.types import BundleInfo

LATENCY_BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
METHODS = ("Infer", "InferStream", "Describe")
REJECTIONS = ("queue", "deadline", "draining")
DECODE_FAILURES: dict[type[IsthmusError], str] = {
    PayloadCorrupt: "corrupt",
    PayloadTooLarge: "too_large",
    UnsupportedVersion: "version",
}

log = logging.getLogger("isthmus.cloud")


class CloudMetrics:
    """One instance a service; every name starts with isthmus_."""

    def __init__(self, registry: CollectorRegistry, bundles: Sequence[BundleInfo]) -> None:
        self._requests = Counter(
            "isthmus_cloud_requests", "Inputs answered, by gRPC code.", ["method", "code"], registry=registry
        )
        self._duration = Histogram(
            "isthmus_cloud_request_duration_seconds",
            "From arrival of an input to its answer.",
            ["method"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._queue_wait = Histogram(
            "isthmus_cloud_queue_wait_seconds",
            "Wait for a batch.",
            ["model"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._compute = Histogram(
            "isthmus_cloud_compute_duration_seconds",
            "Decoding and tail of one batch.",
            ["model"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._batch_size = Histogram(
            "isthmus_cloud_batch_size", "Inputs a batch.", ["model"], buckets=BATCH_BUCKETS, registry=registry
        )
        self._depth = Gauge("isthmus_cloud_queue_depth", "Inputs waiting for a batch.", registry=registry)
        self._inflight = Gauge("isthmus_cloud_inflight_requests", "Inputs being answered.", registry=registry)
        self._rejected = Counter(
            "isthmus_cloud_requests_rejected", "Inputs refused unread.", ["reason"], registry=registry
        )
        self._expired = Counter(
            "isthmus_cloud_expired_work",
            "Inputs whose deadline passed: in the queue (not computed) or while they were computed.",
            ["stage"],
            registry=registry,
        )
        self._decode = Counter(
            "isthmus_cloud_decode_failures", "Payloads that could not be read.", ["reason"], registry=registry
        )
        Gauge("isthmus_build_info", "Software version.", ["version"], registry=registry).labels(version("isthmus")).set(
            1
        )
        model_info = Gauge("isthmus_model_info", "Bundles held.", ["model", "version"], registry=registry)
        for bundle in bundles:
            model_info.labels(bundle.name, bundle.fingerprint.hex()[:12]).set(1)
            for family in (self._queue_wait, self._compute, self._batch_size):
                family.labels(bundle.name)
        for method in METHODS:
            self._requests.labels(method, "OK")
            self._duration.labels(method)
        for reason in REJECTIONS:
            self._rejected.labels(reason)
        for stage in ("queue", "compute"):
            self._expired.labels(stage)
        for reason in ("checksum", *DECODE_FAILURES.values()):
            self._decode.labels(reason)

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

    def queue_depth(self, depth: int) -> None:
        self._depth.set(depth)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def expired(self, stage: str) -> None:
        self._expired.labels(stage).inc()

    def unreadable(self, error: IsthmusError, *, on_arrival: bool) -> None:
        """Count a payload that could not be read; on arrival, corruption means the checksum did not match."""
        reason = DECODE_FAILURES.get(type(error))
        if reason is not None:
            self._decode.labels("checksum" if on_arrival and reason == "corrupt" else reason).inc()

    def log_failure(self, what: str) -> None:
        """A failure of ours, with its traceback, in the log alone."""
        log.exception(what)
