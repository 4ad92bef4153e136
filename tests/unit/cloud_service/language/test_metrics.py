from __future__ import annotations

import logging
import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from isthmus.cloud_service.language.metrics import (
    DRAFTS,
    EVICTIONS,
    POSITIONS,
    PROCESSED,
    ROWS,
    STATE_ROUNDS,
    EngineMetricFamilies,
    EngineMetrics,
)
from isthmus.models.messages import Processed


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> EngineMetrics:
    return EngineMetrics(EngineMetricFamilies(registry), "tiny")


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"isthmus_cloud_{name}", {"model": "tiny", **labels})


def test_every_name_has_our_prefix_and_known_labels_start_at_zero(
    metrics: EngineMetrics, registry: CollectorRegistry
) -> None:
    families = list(registry.collect())
    assert len(families) == 13
    assert all(family.name.startswith("isthmus_cloud_") for family in families)
    for name, label, values in (
        ("decoder_rows_total", "kind", ROWS),
        ("draft_tokens_total", "result", DRAFTS),
        ("state_rounds_total", "kind", STATE_ROUNDS),
        ("state_positions_total", "kind", POSITIONS),
        ("processed_tokens_total", "kind", PROCESSED),
        ("context_evictions_total", "reason", EVICTIONS),
    ):
        assert [value(registry, name, **{label: known}) for known in values] == [0] * len(values)
    for name in (
        "tokens_committed_total",
        "model_flops_total",
        "contexts_held",
        "contexts_bytes",
        "decoder_pass_seconds_count",
    ):
        assert value(registry, name) == 0


def test_a_step_counts_its_tokens_and_its_padding(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    metrics.step(5, 16, 0.5)
    assert [value(registry, "decoder_rows_total", kind=kind) for kind in ROWS] == [5, 11]
    assert value(registry, "decoder_pass_seconds_sum") == 0.5


def test_what_a_model_processed_is_counted(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    for processed in (Processed(5, 700), Processed(4, 300, repeated=3)):
        metrics.processed(processed)
    assert [value(registry, "processed_tokens_total", kind=kind) for kind in PROCESSED] == [6, 3]
    assert value(registry, "model_flops_total") == 1000


def test_a_round_counts_its_drafts_and_tokens(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    metrics.committed(accepted=3, drafted=8, own=1)
    assert [value(registry, "draft_tokens_total", result=result) for result in DRAFTS] == [3, 5]
    assert value(registry, "tokens_committed_total") == 4


def test_a_round_of_states_counts_the_token_that_it_decided(
    metrics: EngineMetrics, registry: CollectorRegistry
) -> None:
    for own in (1, 0, 1):
        metrics.handoff_round(own)
    metrics.states(3, 20)
    assert [value(registry, "state_rounds_total", kind=kind) for kind in STATE_ROUNDS] == [2, 1]
    assert [value(registry, "state_positions_total", kind=kind) for kind in POSITIONS] == [3, 20]
    assert value(registry, "tokens_committed_total") == 2


def test_caches_and_evictions(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    metrics.caches(7, 1000)
    metrics.evicted("idle")
    assert (value(registry, "contexts_held"), value(registry, "contexts_bytes")) == (7, 1000)
    assert [value(registry, "context_evictions_total", reason=reason) for reason in EVICTIONS] == [0, 1]


def test_two_models_of_one_service_are_counted_apart(registry: CollectorRegistry) -> None:
    families = EngineMetricFamilies(registry)
    first, second = EngineMetrics(families, "tiny"), EngineMetrics(families, "other")
    first.committed(0, 0, 1)
    second.committed(0, 0, 2)
    assert value(registry, "tokens_committed_total") == 1


def test_a_fault_of_the_service_is_logged_with_its_traceback(
    metrics: EngineMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "isthmus.cloud"):
        try:
            raise RuntimeError("a kernel broke")
        except RuntimeError:
            metrics.log_failure("step failed")
    assert "step failed" in caplog.text and "a kernel broke" in caplog.text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_metrics(metrics: EngineMetrics, registry: CollectorRegistry) -> None:
    result = subprocess.run(["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
