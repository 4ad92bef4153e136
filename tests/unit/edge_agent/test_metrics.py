from __future__ import annotations

import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from edge_agent.answer import Answer
from edge_agent.metrics import REASONS, ROUTES, EdgeMetrics
from models.bundle import Bundle

SPLIT = Answer(
    "good", 0, (0.9, 0.1), "split", None, 1, 330, 25, {"head": 10.0, "encode": 2.0, "total": 60.0}, False, 0, "x"
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry, tiny_bundle: Bundle) -> EdgeMetrics:
    return EdgeMetrics(registry, tiny_bundle.manifest)


def test_every_name_is_ours_and_known_labels_start_at_zero(metrics: EdgeMetrics, registry: CollectorRegistry) -> None:
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert families
    assert all(family.name.startswith("isthmus_") for family in families)
    for route in ROUTES:
        labels = {"route": route, "outcome": "ok", "model": "tiny"}
        assert registry.get_sample_value("isthmus_edge_requests_total", labels) == 0
    for reason in REASONS:
        assert registry.get_sample_value("isthmus_edge_degraded_responses_total", {"reason": reason}) == 0


def test_an_answer_moves_what_it_should(metrics: EdgeMetrics, registry: CollectorRegistry) -> None:
    metrics.answered(SPLIT)
    value = registry.get_sample_value
    assert value("isthmus_edge_requests_total", {"route": "split", "outcome": "ok", "model": "tiny"}) == 1
    assert value("isthmus_edge_offload_bytes_total", {"direction": "sent"}) == 330
    assert value("isthmus_edge_offload_bytes_total", {"direction": "received"}) == 25
    assert value("isthmus_edge_request_duration_seconds_sum", {"route": "split"}) == pytest.approx(0.06)
    assert value("isthmus_edge_head_duration_seconds_sum", {"model": "tiny"}) == pytest.approx(0.01)
    assert value("isthmus_edge_encode_duration_seconds_count", {"model": "tiny"}) == 1


def test_without_a_link_its_gauges_stay(metrics: EdgeMetrics, registry: CollectorRegistry) -> None:
    metrics.link(None)
    assert registry.get_sample_value("isthmus_edge_circuit_breaker_state", {"state": "open"}) is None


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_is_content(metrics: EdgeMetrics, registry: CollectorRegistry) -> None:
    metrics.answered(SPLIT)
    result = subprocess.run(["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
