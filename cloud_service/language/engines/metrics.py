"""Prometheus metrics of an engine over HTTP, of which a service has one. The registry is passed in."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from isthmus.cloud_service.language.metrics import PROCESSED
from isthmus.models.errors import EngineDown, Overloaded
from isthmus.models.messages import Processed

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
KINDS = ("lost", "overloaded", "fault")
FAULT_LOG_S = 10.0

log = logging.getLogger("isthmus.cloud")


class RequestMetrics:
    """Every name starts with isthmus_cloud_engine_. Known labels exist from the start, at zero."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"isthmus_cloud_engine_{name}", text, labels, registry=registry)

        self._up = gauge("up", "Whether the engine over HTTP can be used: 1 or 0.")
        self._running = gauge("requests_running", "Requests that the engine is working on for sessions.")
        self._waiting = gauge("requests_waiting", "Requests of sessions that wait for a place at the engine.")
        self._compared = gauge(
            "compared_tokens", "Tokens of the start-up check, by whether scoring chose as streaming did.", "result"
        )
        self._tokens = Counter(
            "isthmus_cloud_engine_tokens", "Tokens committed to sessions on the engine's word.", registry=registry
        )
        self._processed = Counter(
            "isthmus_cloud_engine_processed_tokens",
            "Tokens that the engine was sent or generated: new ones, or repeated ones, which its cache may have held.",
            ["kind"],
            registry=registry,
        )
        self._errors = Counter(
            "isthmus_cloud_engine_errors",
            "Requests that failed: the engine was lost, had no room, or answered what cannot be right.",
            ["kind"],
            registry=registry,
        )
        self._first_token = Histogram(
            "isthmus_cloud_engine_first_token_seconds",
            "From sending a request to the engine until its first token.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        for kind in KINDS:
            self._errors.labels(kind)
        for kind in PROCESSED:
            self._processed.labels(kind)
        self.compared(0, 0)
        self._logged_s = float("-inf")

    def up(self, usable: bool) -> None:
        """Whether devices can use the engine."""
        self._up.set(usable)

    def compared(self, tokens: int, different: int) -> None:
        """What the start-up check found."""
        self._compared.labels("same").set(tokens - different)
        self._compared.labels("different").set(different)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a place at the engine."""
        with self._waiting.track_inprogress():
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a request of a session."""
        with self._running.track_inprogress():
            yield

    def first_token(self, seconds: float) -> None:
        """A stream brought its first token."""
        self._first_token.observe(seconds)

    def committed(self, tokens: int) -> None:
        """A round ended with so many new tokens."""
        self._tokens.inc(tokens)

    def processed(self, processed: Processed) -> None:
        """Tokens of one session at the engine."""
        self._processed.labels("new").inc(processed.tokens - processed.repeated)
        self._processed.labels("repeated").inc(processed.repeated)

    def failed(self, error: Exception) -> None:
        """A request failed."""
        kind = "lost" if isinstance(error, EngineDown) else "overloaded" if isinstance(error, Overloaded) else "fault"
        self._errors.labels(kind).inc()

    def log_state(self, text: str, *, lost: bool = False) -> None:
        """Log what an operator wants to know: once for each change."""
        log.log(logging.WARNING if lost else logging.INFO, text)

    def log_fault(self, what: str) -> None:
        """Log what an engine did wrong, at most once in FAULT_LOG_S."""
        if time.monotonic() - self._logged_s >= FAULT_LOG_S:
            self._logged_s = time.monotonic()
            log.warning(what)

    def log_failure(self, what: str) -> None:
        """Log a fault of the service with its traceback, which devices never see."""
        log.exception(what)
