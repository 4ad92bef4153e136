"""Prometheus metrics of language sessions. The registry is passed in."""

from __future__ import annotations

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from isthmus.models.messages import Processed

STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
ROWS = ("used", "padding")
DRAFTS = ("accepted", "rejected")
EVICTIONS = ("budget", "idle")
STATE_ROUNDS = ("decided", "kept")
POSITIONS = ("run", "filled")
PROCESSED = ("new", "repeated")

log = logging.getLogger("isthmus.cloud")


class EngineMetricFamilies:
    """One instance a service, shared by all its language models. Every name starts with isthmus_cloud_."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"isthmus_cloud_{name}", text, ["model", *labels], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"isthmus_cloud_{name}", text, ["model"], registry=registry)

        self.rows = counter("decoder_rows", "Rows of forward passes: tokens of sessions, or padding.", "kind")
        self.tokens = counter("tokens_committed", "Tokens committed to a sequence.")
        self.drafts = counter("draft_tokens", "Draft tokens that devices sent, accepted or rejected.", "result")
        self.state_rounds = counter(
            "state_rounds",
            "Rounds of hidden states: those that decided a token, and those that only extended the KV cache.",
            "kind",
        )
        self.positions = counter(
            "state_positions",
            "Positions whose upper layers were run, or approximated by a KV fill (of prompts too).",
            "kind",
        )
        self.processed = counter(
            "processed_tokens",
            "Tokens that the model processed for sessions: new ones, or repeated ones that it had processed before.",
            "kind",
        )
        self.shared = counter(
            "shared_tokens", "Tokens whose KV cache was copied from another session with the same beginning."
        )
        self.flops = counter(
            "model_flops", "Floating-point operations of processed tokens, counted from the model's sizes."
        )
        self.refused = counter("prompts_refused", "Prompts refused because their first token would have come too late.")
        self.evictions = counter("context_evictions", "KV caches of sessions evicted.", "reason")
        self.sessions = gauge("contexts_held", "KV caches of sessions in memory.")
        self.bytes = gauge("contexts_bytes", "Memory of KV caches, in bytes.")
        self.steps = Histogram(
            "isthmus_cloud_decoder_pass_seconds",
            "Duration of one step, a forward pass over tokens of many sessions.",
            ["model"],
            buckets=STEP_BUCKETS,
            registry=registry,
        )


class EngineMetrics:
    """One instance a language model. Known labels exist from the start, at zero."""

    def __init__(self, families: EngineMetricFamilies, model: str) -> None:
        self._rows = {kind: families.rows.labels(model, kind) for kind in ROWS}
        self._drafts = {result: families.drafts.labels(model, result) for result in DRAFTS}
        self._state_rounds = {kind: families.state_rounds.labels(model, kind) for kind in STATE_ROUNDS}
        self._positions = {kind: families.positions.labels(model, kind) for kind in POSITIONS}
        self._processed = {kind: families.processed.labels(model, kind) for kind in PROCESSED}
        self._flops = families.flops.labels(model)
        self._shared = families.shared.labels(model)
        self._evictions = {reason: families.evictions.labels(model, reason) for reason in EVICTIONS}
        self._tokens = families.tokens.labels(model)
        self._refused = families.refused.labels(model)
        self._sessions = families.sessions.labels(model)
        self._bytes = families.bytes.labels(model)
        self._steps = families.steps.labels(model)

    def step(self, tokens: int, width: int, seconds: float) -> None:
        """A step ran `tokens` of the `width` rows that a forward pass has."""
        self._rows["used"].inc(tokens)
        self._rows["padding"].inc(width - tokens)
        self._steps.observe(seconds)

    def committed(self, accepted: int, drafted: int, own: int) -> None:
        """A round ended: `accepted` of its `drafted` tokens, and `own` tokens of the cloud's."""
        self._tokens.inc(accepted + own)
        self._drafts["accepted"].inc(accepted)
        self._drafts["rejected"].inc(drafted - accepted)

    def handoff_round(self, own: int) -> None:
        """A round of hidden states ended, with `own` tokens of the cloud's: one or none."""
        self._state_rounds["decided" if own else "kept"].inc()
        self._tokens.inc(own)

    def states(self, run: int, filled: int) -> None:
        """A step ran hidden states through layers, or filled in the KV cache of positions."""
        self._positions["run"].inc(run)
        self._positions["filled"].inc(filled)

    def processed(self, processed: Processed) -> None:
        """A step computed tokens of one session."""
        self._processed["new"].inc(processed.tokens - processed.repeated)
        self._processed["repeated"].inc(processed.repeated)
        self._flops.inc(processed.flops)

    def shared(self, tokens: int) -> None:
        """A session has copied the state of its first tokens from another."""
        self._shared.inc(tokens)

    def refused(self) -> None:
        """A prompt was refused, since its first token would have come too late."""
        self._refused.inc()

    def evicted(self, reason: str) -> None:
        """A KV cache was evicted: for others' memory, or because it was idle."""
        self._evictions[reason].inc()

    def caches(self, number: int, size_bytes: int) -> None:
        """KV caches in memory now."""
        self._sessions.set(number)
        self._bytes.set(size_bytes)

    def log_warning(self, what: str) -> None:
        """Log what an operator may want to know."""
        log.warning(what)

    def log_failure(self, what: str) -> None:
        """Log a fault of the service with its traceback, which devices never see."""
        log.exception(what)
