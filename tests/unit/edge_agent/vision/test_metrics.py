from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from isthmus.edge_agent.vision.metrics import REASONS, ROUTES, EdgeMetrics, degraded_reason
from isthmus.edge_agent.vision.replicas import Replicas
from isthmus.edge_agent.vision.result import Answer
from isthmus.edge_agent.vision.task_answers import Classification, Detections
from isthmus.models.errors import DeadlineExceeded, InvalidInput, IsthmusError, LinkDown, Overloaded, PayloadTooLarge
from isthmus.models.vision.bundle import Bundle
from tests.tiny_detector import write_tiny_detector

SPLIT = Answer(
    label="good",
    index=0,
    probabilities=(0.9, 0.1),
    answers={"defect": Classification("good", 0, (0.9, 0.1))},
    missing=(),
    route="split",
    exit=None,
    tap="light",
    width=0.5,
    rate=1,
    bytes_up=330,
    bytes_down=25,
    stage_ms={"head": 10.0, "encode": 2.0, "total": 60.0},
    degraded=False,
    cost_usd=0,
    why="x",
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry, tiny_bundle: Bundle) -> EdgeMetrics:
    return EdgeMetrics(registry, tiny_bundle.manifest)


def test_every_name_has_the_prefix_and_known_labels_start_at_zero(
    metrics: EdgeMetrics, registry: CollectorRegistry
) -> None:
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert families
    assert all(family.name.startswith("isthmus_") for family in families)
    for route in ROUTES:
        labels = {"route": route, "outcome": "ok", "model": "tiny"}
        assert registry.get_sample_value("isthmus_edge_requests_total", labels) == 0
    for reason in REASONS:
        assert registry.get_sample_value("isthmus_edge_degraded_responses_total", {"reason": reason}) == 0


def test_an_answer_updates_its_metrics(metrics: EdgeMetrics, registry: CollectorRegistry) -> None:
    metrics.answered(SPLIT)
    value = registry.get_sample_value
    assert value("isthmus_edge_requests_total", {"route": "split", "outcome": "ok", "model": "tiny"}) == 1
    assert value("isthmus_edge_offload_bytes_total", {"direction": "sent"}) == 330
    assert value("isthmus_edge_offload_bytes_total", {"direction": "received"}) == 25
    assert value("isthmus_edge_request_duration_seconds_sum", {"route": "split"}) == pytest.approx(0.06)
    assert value("isthmus_edge_head_duration_seconds_sum", {"model": "tiny"}) == pytest.approx(0.01)
    assert value("isthmus_edge_encode_duration_seconds_count", {"model": "tiny"}) == 1


def test_latents_are_counted_by_operating_point(metrics: EdgeMetrics, registry: CollectorRegistry) -> None:
    metrics.encoded(112, "light", 0.5, 2)

    def count(tap: str, width: str, rate: str) -> float | None:
        labels = {"model": "tiny", "tap": tap, "width": width, "rate": rate}
        return registry.get_sample_value("isthmus_edge_bottlenecks_total", labels)

    assert (count("light", "0.5", "2"), count("light", "1", "2"), count("deep", "1", "1")) == (1, 0, 0)
    assert registry.get_sample_value("isthmus_edge_bottleneck_size_bytes_sum", {"model": "tiny"}) == 112


def test_missing_answers_are_counted_by_task(metrics: EdgeMetrics, registry: CollectorRegistry) -> None:
    assert registry.get_sample_value("isthmus_edge_missing_answers_total", {"task": "colour"}) == 0
    metrics.answered(replace(SPLIT, route="fallback", exit="exit0", missing=("colour",)))
    assert registry.get_sample_value("isthmus_edge_missing_answers_total", {"task": "colour"}) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LinkDown("x"), "cloud_down"),
        (DeadlineExceeded("x"), "deadline"),
        (PayloadTooLarge("x"), "too_large"),
        (Overloaded("x"), "rejected"),
        (InvalidInput("x"), "rejected"),
    ],
)
def test_every_error_has_a_reason_that_is_counted(
    metrics: EdgeMetrics, registry: CollectorRegistry, error: IsthmusError, reason: str
) -> None:
    assert degraded_reason(error) == reason
    metrics.degraded(reason)
    assert registry.get_sample_value("isthmus_edge_degraded_responses_total", {"reason": reason}) == 1


def test_without_a_link_its_gauges_stay(metrics: EdgeMetrics, registry: CollectorRegistry) -> None:
    metrics.replicas(Replicas([]))
    assert registry.get_sample_value("isthmus_edge_circuit_breaker_state", {"state": "open"}) is None


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_metrics(metrics: EdgeMetrics, registry: CollectorRegistry) -> None:
    metrics.answered(SPLIT)
    result = subprocess.run(["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()


def test_boxes_are_counted_by_task(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, write_tiny_detector(tmp_path / "b").manifest)
    labels = {"model": "tiny-detector", "task": "things"}
    assert registry.get_sample_value("isthmus_edge_boxes_total", labels) == 0
    three = Detections(np.zeros((3, 4), np.float32), np.ones(3, np.float32), np.zeros(3, np.uint16), ("red", "green"))
    metrics.answered(replace(SPLIT, answers={"things": three}))
    assert registry.get_sample_value("isthmus_edge_boxes_total", labels) == 3
    assert registry.get_sample_value("isthmus_edge_missing_answers_total", {"task": "things"}) == 0
