"""What the service exports about language sessions. The registry is passed in."""

from __future__ import annotations

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PASS_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
EVICTIONS = ("budget", "idle")
DRAFTS = ("accepted", "rejected")

log = logging.getLogger("isthmus.cloud")


class GenerationMetrics:
    """One instance a language model; every name starts with isthmus_cloud_."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"isthmus_cloud_{name}", text, ["model", *labels], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"isthmus_cloud_{name}", text, ["model"], registry=registry)

        self._model = model
        self._rows = counter("decoder_rows", "Rows of forward passes: of a session, or padding.", "kind")
        self._tokens = counter("tokens_committed", "Tokens that became part of an answer.")
        self._drafts = counter("draft_tokens", "Draft tokens that devices sent.", "result")
        self._evictions = counter("context_evictions", "Session states given up.", "reason")
        self._sessions = gauge("contexts_held", "Session states in memory.").labels(model)
        self._bytes = gauge("contexts_bytes", "Memory of session states.").labels(model)
        self._pass = Histogram(
            "isthmus_cloud_decoder_pass_seconds",
            "One forward pass.",
            ["model"],
            buckets=PASS_BUCKETS,
            registry=registry,
        ).labels(model)
        self._tokens.labels(model)
        for family, values in (
            (self._rows, ("used", "padding")),
            (self._drafts, DRAFTS),
            (self._evictions, EVICTIONS),
        ):
            for value in values:
                family.labels(model, value)

    def passed(self, rows: int, width: int, seconds: float) -> None:
        self._rows.labels(self._model, "used").inc(rows)
        self._rows.labels(self._model, "padding").inc(width - rows)
        self._pass.observe(seconds)

    def committed(self, accepted: int, drafted: int, own: int) -> None:
        """A round ended: `accepted` of `drafted` tokens, and `own` of the cloud's."""
        self._tokens.labels(self._model).inc(accepted + own)
        self._drafts.labels(self._model, "accepted").inc(accepted)
        self._drafts.labels(self._model, "rejected").inc(drafted - accepted)

    def evicted(self, reason: str) -> None:
        self._evictions.labels(self._model, reason).inc()

    def contexts(self, number: int, size_bytes: int) -> None:
        self._sessions.set(number)
        self._bytes.set(size_bytes)

    def log_failure(self, what: str) -> None:
        """A failure of ours, with its traceback, in the log alone."""
        log.exception(what)
