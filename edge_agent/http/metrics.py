"""Prometheus metrics of the HTTP API. The registry is passed in."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter


class HttpMetrics:
    """One instance for each agent. The routes of the application bound the label `route`."""

    def __init__(self, registry: CollectorRegistry, routes: Iterable[str]) -> None:
        self._requests = Counter(
            "isthmus_edge_http_requests",
            "HTTP requests, by route (other for unknown paths) and status code; 499: the client left before the end.",
            ("route", "code"),
            registry=registry,
        )
        for route in routes:
            self._requests.labels(route, "200")

    def count(self, route: str, code: int) -> None:
        """A request that has ended."""
        self._requests.labels(route, str(code)).inc()
