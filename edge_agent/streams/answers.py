"""An agent's answer as the results have it: its JSON without the list of all probabilities."""

from __future__ import annotations

from typing import Any

from isthmus.edge_agent.vision.result import Answer


def as_json(answer: Answer) -> dict[str, Any]:
    """`edge-agent infer --json` without probabilities: of a thousand labels they are 20 KB a frame."""
    found: dict[str, Any] = without_probabilities(answer.as_dict())
    return found


def without_probabilities(value: Any) -> Any:
    """Every list of probabilities is replaced by `confidence`, the largest of them."""
    if not isinstance(value, dict):
        return value
    left = {key: without_probabilities(each) for key, each in value.items() if key != "probabilities"}
    if value.get("probabilities"):
        left["confidence"] = round(max(value["probabilities"]), 4)
    return left
