from __future__ import annotations

from collections.abc import Generator
from typing import Literal

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from isthmus.edge_agent.language.metrics import SOURCES, LanguageMetrics
from isthmus.edge_agent.language.request import Summary, Token
from isthmus.edge_agent.policy.arms import ARMS
from isthmus.models.errors import LinkDown
from isthmus.models.messages import Processed

SUMMARY = Summary(
    "stop", 5, 4, "verify", "requested", accepted=2, rejected=3, bytes_up=100, bytes_down=40, degraded=True,
    device=Processed(9, 90), cloud=Processed(7, 70, 1),
)  # fmt: skip


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> LanguageMetrics:
    return LanguageMetrics(registry)


def answer(closed: list[int], error: Exception | None = None) -> Generator[Token | Summary, None, None]:
    try:
        yield Token(1, "cloud")
        yield Token(2, "draft")
        yield Token(3, "draft")
        if error:
            raise error
        yield Token(4, "edge")
        yield SUMMARY
    finally:
        closed.append(1)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"isthmus_edge_{name}", labels)


def test_every_name_has_our_prefix_and_known_labels_start_at_zero(
    metrics: LanguageMetrics, registry: CollectorRegistry
) -> None:
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert families and all(family.name.startswith("isthmus_edge_") for family in families)
    assert [value(registry, "tokens_total", source=source) for source in SOURCES] == [0, 0, 0]
    for arm in ARMS:
        assert value(registry, "answers_total", arm=arm, degraded="false") == 0
    assert value(registry, "draft_tokens_total", result="rejected") == 0
    assert value(registry, "language_bytes_total", direction="up") == 0


def test_the_events_of_an_answer_are_passed_through_and_counted(
    metrics: LanguageMetrics, registry: CollectorRegistry
) -> None:
    closed: list[int] = []
    assert list(metrics.watch(answer(closed))) == list(answer([]))
    assert closed == [1]
    counts = [value(registry, "tokens_total", source=source) for source in ("cloud", "draft", "edge")]
    assert counts == [1, 2, 1]
    assert value(registry, "answers_total", arm="verify", degraded="true") == 1
    assert value(registry, "draft_tokens_total", result="accepted") == 2
    assert value(registry, "draft_tokens_total", result="rejected") == 3
    assert value(registry, "language_bytes_total", direction="up") == 100
    assert value(registry, "language_bytes_total", direction="down") == 40
    assert value(registry, "first_token_seconds_count") == 1
    assert [value(registry, "processed_tokens_total", side=side) for side in ("device", "cloud")] == [9, 7]
    assert [value(registry, "model_flops_total", side=side) for side in ("device", "cloud")] == [90, 70]


def test_closing_early_closes_the_generator_itself(metrics: LanguageMetrics, registry: CollectorRegistry) -> None:
    closed: list[int] = []
    source = answer(closed)  # referenced here, so that garbage collection does not close it
    watched = metrics.watch(source)
    assert next(watched) == Token(1, "cloud")
    watched.close()  # type: ignore[attr-defined]
    assert closed == [1]
    assert value(registry, "tokens_total", source="cloud") == 1
    assert value(registry, "answers_total", arm="verify", degraded="true") == 0


@pytest.mark.parametrize("reason", ["closed", "failed"])
def test_what_an_unfinished_answer_cost_is_counted(
    metrics: LanguageMetrics, registry: CollectorRegistry, reason: Literal["closed", "failed"]
) -> None:
    metrics.count_unfinished(SUMMARY, reason)
    assert value(registry, "unfinished_answers_total", arm="verify", reason=reason) == 1
    assert value(registry, "answers_total", arm="verify", degraded="true") == 0
    assert value(registry, "draft_tokens_total", result="rejected") == 3
    assert value(registry, "language_bytes_total", direction="up") == 100


def test_an_error_is_passed_through(metrics: LanguageMetrics) -> None:
    with pytest.raises(LinkDown, match="gone"):
        list(metrics.watch(answer([], LinkDown("gone"))))
