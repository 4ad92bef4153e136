"""What the agent exports about answers of a language model. The registry is passed in."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing

from prometheus_client import CollectorRegistry, Counter, Histogram

from isthmus.edge_agent.language.request import Summary, Token
from isthmus.edge_agent.policy.arms import ARMS

SOURCES = ("edge", "cloud", "draft")
FIRST_BUCKETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 2, 5, 10)


class LanguageMetrics:
    """One instance an agent; every name starts with isthmus_edge_."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"isthmus_edge_{name}", text, labels, registry=registry)

        self._tokens = counter("tokens", "Tokens of answers, by where they were made.", "source")
        self._answers = counter("answers", "Answers of the language model, ended.", "arm", "degraded")
        self._drafts = counter("draft_tokens", "Draft tokens by what the cloud said of them.", "result")
        self._bytes = counter("language_bytes", "Bytes of our messages.", "direction")
        name = "isthmus_edge_first_token_seconds"
        self._first = Histogram(name, "From prompt to first token.", buckets=FIRST_BUCKETS, registry=registry)
        for source in SOURCES:
            self._tokens.labels(source)
        for arm in ARMS:
            for degraded in ("false", "true"):
                self._answers.labels(arm, degraded)
        for result in ("accepted", "rejected"):
            self._drafts.labels(result)
        for direction in ("up", "down"):
            self._bytes.labels(direction)

    def watch(self, events: Generator[Token | Summary, None, None]) -> Iterator[Token | Summary]:
        """Hand on an answer and count it; closing this closes it."""
        started_s, first = time.monotonic(), True
        with closing(events):
            for event in events:
                if isinstance(event, Summary):
                    self._ended(event)
                else:
                    self._tokens.labels(event.source).inc()
                    if first:
                        self._first.observe(time.monotonic() - started_s)
                        first = False
                yield event

    def _ended(self, summary: Summary) -> None:
        self._answers.labels(summary.arm, str(summary.degraded).lower()).inc()
        self._drafts.labels("accepted").inc(summary.accepted)
        self._drafts.labels("rejected").inc(summary.rejected)
        self._bytes.labels("up").inc(summary.bytes_up)
        self._bytes.labels("down").inc(summary.bytes_down)
