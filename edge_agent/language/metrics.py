"""Prometheus metrics of a language model's answers. The registry is passed in."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram

from isthmus.edge_agent.language.request import Summary, Token
from isthmus.edge_agent.policy.arms import ARMS

SOURCES = ("edge", "cloud", "draft")
FIRST_TOKEN_BUCKETS_S = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 2, 5, 10)


class LanguageMetrics:
    """One instance for each agent. Every name starts with isthmus_edge_."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"isthmus_edge_{name}", text, labels, registry=registry)

        self._tokens = counter(
            "tokens",
            "Tokens of answers, by source: edge, cloud, or draft (drafted on the device, confirmed by the cloud).",
            "source",
        )
        self._answers = counter(
            "answers", "Completed answers, by arm and whether the cloud was lost on the way.", "arm", "degraded"
        )
        self._unfinished = counter(
            "unfinished_answers",
            "Answers that ended early, by arm and reason: closed (a stop string, or the client left) or failed.",
            "arm",
            "reason",
        )
        self._drafts = counter("draft_tokens", "Draft tokens that the cloud verified, by result.", "result")
        self._bytes = counter(
            "language_bytes", "Bytes of gRPC messages exchanged with the cloud for answers, by direction.", "direction"
        )
        self._processed = counter("processed_tokens", "Tokens that models processed for answers, by side.", "side")
        self._flops = counter(
            "model_flops", "Floating-point operations of processed tokens, counted from sizes, by side.", "side"
        )
        name = "isthmus_edge_first_token_seconds"
        self._first_token = Histogram(
            name,
            "Time from the request to the first token, in seconds.",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Create every combination of labels, so that rates are defined from the first scrape."""
        for source in SOURCES:
            self._tokens.labels(source)
        for arm in ARMS:
            for degraded in ("false", "true"):
                self._answers.labels(arm, degraded)
            for reason in ("closed", "failed"):
                self._unfinished.labels(arm, reason)
        for result in ("accepted", "rejected"):
            self._drafts.labels(result)
        for direction in ("up", "down"):
            self._bytes.labels(direction)
        for side in ("device", "cloud"):
            self._processed.labels(side)
            self._flops.labels(side)

    def watch(self, events: Generator[Token | Summary, None, None]) -> Iterator[Token | Summary]:
        """Yield the events of an answer and count them. Closing this closes `events`."""
        start_s, first = time.monotonic(), True
        with closing(events):
            for event in events:
                if isinstance(event, Summary):
                    self._count_summary(event)
                else:
                    self._tokens.labels(event.source).inc()
                    if first:
                        self._first_token.observe(time.monotonic() - start_s)
                        first = False
                yield event

    def count_unfinished(self, summary: Summary, reason: Literal["closed", "failed"]) -> None:
        """Count an answer that ended without its last event: what it cost is counted all the same."""
        self._unfinished.labels(summary.arm, reason).inc()
        self._count_cost(summary)

    def _count_summary(self, summary: Summary) -> None:
        self._answers.labels(summary.arm, str(summary.degraded).lower()).inc()
        self._count_cost(summary)

    def _count_cost(self, summary: Summary) -> None:
        self._drafts.labels("accepted").inc(summary.accepted)
        self._drafts.labels("rejected").inc(summary.rejected)
        self._bytes.labels("up").inc(summary.bytes_up)
        self._bytes.labels("down").inc(summary.bytes_down)
        for side, processed in (("device", summary.device), ("cloud", summary.cloud)):
            self._processed.labels(side).inc(processed.tokens)
            self._flops.labels(side).inc(processed.flops)
