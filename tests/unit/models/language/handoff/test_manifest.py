"""What a handoff manifest accepts and refuses, and the threshold that exits decode at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from isthmus.models.language.handoff.manifest import (
    NEVER,
    HandoffManifest,
    Threshold,
    least_likely,
)

FILES = ("exit3.safetensors", "exit5.safetensors", "states.safetensors", "fill.safetensors")


def content(**changes: Any) -> dict[str, Any]:
    """A valid manifest, with some fields replaced."""
    return {
        "schema_version": 4,
        "kind": "handoff",
        "name": "tiny",
        "licence": "Apache-2.0",
        "base": "ab" * 32,
        "hidden": 64,
        "depth": 5,
        "exits": [
            {"depth": 3, "weights": "exit3.safetensors", "agreement": 0.6},
            {"depth": 5, "weights": "exit5.safetensors", "agreement": 0.8},
        ],
        "thresholds": [{"confidence": 0.9, "coverage": 0.5, "agreement": 0.97}],
        "states": "states.safetensors",
        "rates": [{"mean_bytes": 30.0, "max_bytes": 60}, {"mean_bytes": 50.0, "max_bytes": 90}],
        "points": [
            {"context_rate": 0, "rate": 0, "mean_bytes": 30.0, "agreement": 0.9},
            {"context_rate": 0, "rate": 1, "mean_bytes": 35.0, "agreement": 0.95},
        ],
        "max_state_bytes": 160,
        "fill": "fill.safetensors",
        "training": {"command": "c", "seed": 0, "seconds": 1.0, "machine": "m", "data": "d", "versions": {}},
        "scores": {},
        "files": {name: {"size": 1, "sha256": "cd" * 32} for name in FILES},
        "fingerprint": "ef" * 32,
        **changes,
    }


def point(context_rate: int, rate: int, mean_bytes: float) -> dict[str, Any]:
    return {"context_rate": context_rate, "rate": rate, "mean_bytes": mean_bytes, "agreement": 0.9}


def test_a_valid_manifest_keeps_its_content() -> None:
    manifest = HandoffManifest.model_validate(content())
    assert manifest.model_dump(mode="json") == content()
    assert [exit_.depth for exit_ in manifest.exits] == [3, 5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 6}, r"depths of the exits \[3, 5\] must rise to 6"),
        ({"exits": content()["exits"][::-1]}, r"depths of the exits \[5, 3\] must rise to 5"),
        ({"exits": [content()["exits"][1]] * 2}, r"depths of the exits \[5, 5\] must rise to 5"),
        ({"exits": []}, "at least 1 item"),
        ({"exits": [{"depth": 0, "weights": "exit3.safetensors", "agreement": 0.6}]}, "greater than or equal to 1"),
        ({"points": [point(0, 2, 30.0)]}, "a point has an unknown rate, expected 0 to 1"),
        ({"points": [point(2, 0, 30.0)]}, "a point has an unknown rate, expected 0 to 1"),
        ({"points": [point(0, 0, 30.0), point(0, 1, 29.0)]}, r"mean_bytes of the points \[30.0, 29.0\] must rise"),
        ({"thresholds": []}, "at least 1 item"),
        ({"thresholds": [{"confidence": 1.1, "coverage": 0.5, "agreement": 0.97}]}, "less than or equal to 1"),
        ({"states": "missing.safetensors"}, r"files does not list missing\.safetensors"),
        ({"fill": "missing.safetensors"}, r"files does not list missing\.safetensors"),
        ({"fill": "../fill.safetensors"}, "should match pattern"),
        ({"kind": "vision"}, "should be 'handoff'"),
        ({"base": "ab"}, "should match pattern"),
        ({"hidden": 0}, "greater than or equal to 1"),
        ({"max_state_bytes": 1 << 17}, "less than or equal to 65536"),
        ({"rates": [{"mean_bytes": float("nan"), "max_bytes": 60}]}, "finite number"),
        ({"copies": []}, "Extra inputs are not permitted"),
        ({"schema_version": 3}, "expected 4"),
        ({"surprise": 1}, "Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_invalid_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        HandoffManifest.model_validate(content(**changes))


def test_all_missing_files_are_named() -> None:
    exits = [{"depth": 5, "weights": "b.safetensors", "agreement": 0.6}]
    with pytest.raises(ValidationError, match=r"files does not list a\.safetensors, b\.safetensors"):
        HandoffManifest.model_validate(content(exits=exits, fill="a.safetensors"))


def test_manifests_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Threshold(confidence=0.5, coverage=0.5, agreement=0.9).coverage = 0.6  # type: ignore[misc]


def thresholds(*pairs: tuple[float, float]) -> list[Threshold]:
    """From pairs of confidence and agreement."""
    return [Threshold(confidence=confidence, coverage=0.5, agreement=agreement) for confidence, agreement in pairs]


@pytest.mark.parametrize(
    ("pairs", "agreement", "confidence"),
    [
        ([(0.8, 0.95), (0.98, 0.98), (0.99, 0.99)], 0.97, 0.98),
        ([(0.8, 0.97), (0.9, 0.98)], 0.97, 0.97),  # never below the agreement itself
        (
            [(0.9, 0.98), (0.985, 0.96), (0.99, 0.99)],
            0.97,
            0.97,
        ),  # the lowest that reaches it, even if a later one fails
        ([(0.99, 0.96)], 0.97, NEVER),
        ([(0.5, 0.5)], 0.0, 0.5),
    ],
)
def test_least_likely(pairs: Sequence[tuple[float, float]], agreement: float, confidence: float) -> None:
    assert least_likely(thresholds(*pairs), agreement) == confidence


@given(pairs=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20), agreement=st.floats(0, 1))
def test_least_likely_keeps_its_promise(pairs: list[tuple[float, float]], agreement: float) -> None:
    """Some threshold at or below the result reaches the agreement, or no token is decoded from an exit."""
    found = least_likely(thresholds(*pairs), agreement)
    reaching = [confidence for confidence, measured in pairs if measured >= agreement]
    assert found >= agreement
    assert found == NEVER if not reaching else found == max(min(reaching), agreement)
