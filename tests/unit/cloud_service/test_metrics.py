from __future__ import annotations

import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.metrics import IMAGE, METHODS, REJECTIONS, CloudMetrics
from isthmus.models.errors import InvalidInput, IsthmusError, PayloadCorrupt, PayloadTooLarge, UnsupportedVersion
from isthmus.models.messages import BundleInfo, TapInfo, TaskInfo

INFO = BundleInfo(bytes(32), "fake", (TaskInfo("defect", 2), TaskInfo("colour", 3)), (TapInfo("light", 2),))


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> CloudMetrics:
    return CloudMetrics(registry, [INFO])


def test_every_name_has_our_prefix_and_known_labels_start_at_zero(
    metrics: CloudMetrics, registry: CollectorRegistry
) -> None:
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert families
    assert all(family.name.startswith("isthmus_") for family in families)
    for method in METHODS:
        assert registry.get_sample_value("isthmus_cloud_requests_total", {"method": method, "code": "OK"}) == 0
    for tap in ("light", IMAGE):
        assert registry.get_sample_value("isthmus_cloud_inputs_total", {"model": "fake", "tap": tap}) == 0
    for task in ("defect", "colour"):
        assert registry.get_sample_value("isthmus_cloud_task_answers_total", {"model": "fake", "task": task}) == 0
    for reason in REJECTIONS:
        assert registry.get_sample_value("isthmus_cloud_requests_rejected_total", {"reason": reason}) == 0


@pytest.mark.parametrize(
    ("error", "on_arrival", "reason"),
    [
        (PayloadCorrupt("x"), True, "checksum"),
        (PayloadCorrupt("x"), False, "corrupt"),
        (PayloadTooLarge("x"), True, "too_large"),
        (UnsupportedVersion("x"), True, "version"),
    ],
)
def test_unreadable_payloads_are_counted_by_reason(
    metrics: CloudMetrics, registry: CollectorRegistry, error: IsthmusError, on_arrival: bool, reason: str
) -> None:
    metrics.unreadable(error, on_arrival=on_arrival)
    assert registry.get_sample_value("isthmus_cloud_decode_failures_total", {"reason": reason}) == 1


def test_other_errors_are_not_decode_failures(metrics: CloudMetrics, registry: CollectorRegistry) -> None:
    before = generate_latest(registry)
    metrics.unreadable(InvalidInput("x"), on_arrival=True)
    assert generate_latest(registry) == before


def test_a_batch_counts_its_inputs_waits_and_time(metrics: CloudMetrics, registry: CollectorRegistry) -> None:
    metrics.batch("fake", [0.1, 0.2], 0.5)
    value, model = registry.get_sample_value, {"model": "fake"}
    assert value("isthmus_cloud_queue_wait_seconds_sum", model) == pytest.approx(0.3)
    assert value("isthmus_cloud_batch_size_sum", model) == 2
    assert value("isthmus_cloud_compute_duration_seconds_sum", model) == 0.5


def test_inputs_are_counted_by_tap_and_by_each_task(metrics: CloudMetrics, registry: CollectorRegistry) -> None:
    metrics.computed(INFO, 0, (0, 1), 3)
    metrics.computed(INFO, None, (1,), 2)
    value = registry.get_sample_value
    inputs = [value("isthmus_cloud_inputs_total", {"model": "fake", "tap": tap}) for tap in ("light", IMAGE)]
    tasks = [
        value("isthmus_cloud_task_answers_total", {"model": "fake", "task": task}) for task in ("defect", "colour")
    ]
    assert (inputs, tasks) == ([3, 2], [3, 5])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_metrics(metrics: CloudMetrics, registry: CollectorRegistry) -> None:
    result = subprocess.run(["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()


def test_the_bytes_that_wait_are_read_when_they_are_asked_for(
    metrics: CloudMetrics, registry: CollectorRegistry
) -> None:
    queue = ByteBudget(100)
    metrics.watch(queue)
    queue.take(30)
    assert registry.get_sample_value("isthmus_cloud_queued_bytes") == 30
