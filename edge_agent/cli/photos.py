"""An agent for photos from the command's settings, or the end of the program with one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.edge_agent.config import EdgeConfig
from isthmus.models.bundle.installed import missing
from isthmus.models.errors import IsthmusError
from isthmus.models.fail import fail, needing
from isthmus.models.options import read

if TYPE_CHECKING:  # ONNX Runtime takes half a second to import, which `--help` does without
    from prometheus_client import CollectorRegistry

    from isthmus.edge_agent.vision.agent import EdgeAgent
    from isthmus.edge_agent.vision.metrics import EdgeMetrics


def open_photos() -> EdgeAgent:
    """Without metrics."""
    return opened(read(EdgeConfig), None)


def open_photos_with_metrics(registry: CollectorRegistry) -> tuple[EdgeAgent, EdgeMetrics]:
    with needing("edge"):
        from isthmus.edge_agent.vision.metrics import EdgeMetrics
        from isthmus.models.bundle.files import read_manifest
        from isthmus.models.vision.manifest import Manifest

    config = read(EdgeConfig)
    check(config)
    try:
        metrics = EdgeMetrics(registry, read_manifest(config.bundle, Manifest))
    except IsthmusError as error:
        fail(error)
    return opened(config, metrics), metrics


def opened(config: EdgeConfig, metrics: EdgeMetrics | None) -> EdgeAgent:
    with needing("edge"):
        from isthmus.edge_agent.vision.agent import EdgeAgent

    check(config)
    try:
        return EdgeAgent(config, metrics)
    except (IsthmusError, OSError) as error:
        fail(error)


def check(config: EdgeConfig) -> None:
    if problem := missing(config.bundle):
        fail(problem)
