"""An agent for photos from the command's settings, or the end of the program with one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from isthmus.edge_agent.config import EdgeConfig
from isthmus.models.bundle.installed import missing
from isthmus.models.errors import IsthmusError
from isthmus.models.fail import fail, needing
from isthmus.models.options import read

if TYPE_CHECKING:  # ONNX Runtime takes half a second to import, which `--help` does without
    from prometheus_client import CollectorRegistry

    from isthmus.edge_agent.vision.agent import EdgeAgent
    from isthmus.edge_agent.vision.metrics import EdgeMetrics
    from isthmus.edge_agent.vision.result import Answer


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


def answer_files(
    files: Iterable[Path], ask: Callable[[Path], Answer], as_json: bool, lines: Callable[[Path, Answer], list[str]]
) -> None:
    """Print the answer to each photo: one line of JSON, or `lines`. Ends the program, with 1 if one has none."""
    failed = 0
    for file in files:
        try:
            answer = ask(file)
        except IsthmusError as error:
            failed += 1
            click.echo(f"error: {file}: {error}", err=True)
            continue
        click.echo(json.dumps({"file": str(file), **answer.as_dict()}) if as_json else "\n".join(lines(file, answer)))
    sys.exit(1 if failed else 0)


def check(config: EdgeConfig) -> None:
    if problem := missing(config.bundle):
        fail(problem)
