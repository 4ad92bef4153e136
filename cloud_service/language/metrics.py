"""What the service exports about language sessions. The registry is passed in."""

from __future__ import annotations

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PASS_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
ROWS = ("used", "padding")
DRAFTS = ("accepted", "rejected")
EVICTIONS = ("budget", "idle")
STATE_ROUNDS = ("decided", "kept")
POSITIONS = ("run", "filled")

log = logging.getLogger("isthmus.cloud")


class EngineMetricFamilies:
    """Once a service, for all its language models; every name starts with isthmus_cloud_."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"isthmus_cloud_{name}", text, ["model", *labels], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"isthmus_cloud_{name}", text, ["model"], registry=registry)

        self.rows = counter("decoder_rows", "Rows of forward passes: of a session, or padding.", "kind")
        self.tokens = counter("tokens_committed", "Tokens that became part of an answer.")
        self.drafts = counter("draft_tokens", "Draft tokens that devices sent.", "result")
        self.state_rounds = counter("state_rounds", "Rounds of hidden states: with a token, or none asked for.", "kind")
        self.positions = counter(
            "state_positions", "Hidden states run through layers; positions, of prompts too, filled in instead.", "kind"
        )
        self.evictions = counter("context_evictions", "Session states given up.", "reason")
        self.sessions = gauge("contexts_held", "Session states in memory.")
        self.bytes = gauge("contexts_bytes", "Memory of session states.")
        self.passes = Histogram(
            "isthmus_cloud_decoder_pass_seconds",
            "One forward pass.",
            ["model"],
            buckets=PASS_BUCKETS,
            registry=registry,
        )


class EngineMetrics:
    """One instance a language model. Known labels exist from the start."""

    def __init__(self, families: EngineMetricFamilies, model: str) -> None:
        self._rows = {kind: families.rows.labels(model, kind) for kind in ROWS}
        self._drafts = {result: families.drafts.labels(model, result) for result in DRAFTS}
        self._state_rounds = {kind: families.state_rounds.labels(model, kind) for kind in STATE_ROUNDS}
        self._positions = {kind: families.positions.labels(model, kind) for kind in POSITIONS}
        self._evictions = {reason: families.evictions.labels(model, reason) for reason in EVICTIONS}
        self._tokens = families.tokens.labels(model)
        self._sessions = families.sessions.labels(model)
        self._bytes = families.bytes.labels(model)
        self._passes = families.passes.labels(model)

    def passed(self, rows: int, width: int, seconds: float) -> None:
        self._rows["used"].inc(rows)
        self._rows["padding"].inc(width - rows)
        self._passes.observe(seconds)

    def committed(self, accepted: int, drafted: int, own: int) -> None:
        """A round ended: `accepted` of `drafted` tokens, and `own` of the cloud's."""
        self._tokens.inc(accepted + own)
        self._drafts["accepted"].inc(accepted)
        self._drafts["rejected"].inc(drafted - accepted)

    def handed_off(self, own: int) -> None:
        """A round of hidden states ended, with `own` tokens of the cloud's: one or none."""
        self._state_rounds["decided" if own else "kept"].inc()
        self._tokens.inc(own)

    def took(self, run: int, filled: int) -> None:
        """A pass took up hidden states."""
        self._positions["run"].inc(run)
        self._positions["filled"].inc(filled)

    def evicted(self, reason: str) -> None:
        self._evictions[reason].inc()

    def contexts(self, number: int, size_bytes: int) -> None:
        self._sessions.set(number)
        self._bytes.set(size_bytes)

    def log_warning(self, what: str) -> None:
        """What an operator may want to know."""
        log.warning(what)

    def log_failure(self, what: str) -> None:
        """A failure of ours, with its traceback, in the log alone."""
        log.exception(what)
