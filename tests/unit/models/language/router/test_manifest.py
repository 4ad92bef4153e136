"""What a router manifest accepts and refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from isthmus.models.language.router.manifest import MAX_BYTES, OffloadLevel, RouterManifest
from tests.tiny_router import level_content as level

LEVELS = [level(0.0, 0.0, 0.04), level(0.6, 0.05, 0.01)]


def certificate(**changes: Any) -> dict[str, Any]:
    return {"epsilon": 0.1, "delta": 0.1, "prompts": 9, **changes}


def content(**changes: Any) -> dict[str, Any]:
    """A valid manifest, with some fields replaced."""
    return {
        "schema_version": 3,
        "kind": "router",
        "name": "small-8-large",
        "licence": "as the models'",
        "device": {"name": "small", "weights": "ab" * 32, "bits": 8},
        "cloud": {"name": "Large/Model", "tokenizer": "cd" * 32, "weights": None},
        "head": "head.safetensors",
        "verifier": None,
        "token_levels": LEVELS,
        "answer_levels": [],
        "query_levels": [],
        "training": {"command": "c", "seed": 0, "seconds": 1.0, "machine": "m", "data": "d", "versions": {}},
        "scores": {},
        "files": {"head.safetensors": {"size": 900, "sha256": "ef" * 32}},
        "fingerprint": "01" * 32,
        **changes,
    }


def test_a_valid_manifest_keeps_its_content() -> None:
    manifest = RouterManifest.model_validate(content())
    assert manifest.model_dump(mode="json") == content()
    assert manifest.token_levels[1].certificate.epsilon == 0.01


def test_levels_of_whole_answers_need_no_head() -> None:
    files = {"answers.safetensors": {"size": 900, "sha256": "ef" * 32}}
    changes = {"head": None, "token_levels": [], "verifier": "answers.safetensors", "answer_levels": LEVELS}
    manifest = RouterManifest.model_validate(content(**changes, files=files))
    assert not manifest.token_levels and len(manifest.answer_levels) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "handoff"}, "should be 'router'"),
        ({"schema_version": 4}, "expected 3"),
        ({"surprise": 1}, "Extra inputs are not permitted"),
        ({"device": {"name": "small", "weights": "ab" * 32, "bits": 5}}, "should be 4 or 8"),
        ({"device": {"name": "", "weights": "ab" * 32, "bits": 8}}, "at least 1 character"),
        ({"device": {"name": "x" * 201, "weights": "ab" * 32, "bits": 8}}, "at most 200 characters"),
        ({"device": {"name": "small", "weights": "ab", "bits": 8}}, "should match pattern"),
        ({"cloud": {"name": "large"}}, "Field required"),
        ({"cloud": {"name": "large", "tokenizer": "CD" * 32}}, "should match pattern"),
        ({"head": None}, "head and token_levels need each other"),
        ({"token_levels": []}, "head and token_levels need each other"),
        ({"token_levels": [], "head": None}, "there are no levels"),
        ({"answer_levels": LEVELS}, "verifier and levels of whole answers need each other"),
        ({"verifier": "answers.safetensors"}, "verifier and levels of whole answers need each other"),
        ({"verifier": "no.safetensors", "query_levels": LEVELS}, r"files does not list no\.safetensors"),
        ({"head": "other.safetensors"}, r"files does not list other\.safetensors"),
        ({"head": "../head.safetensors"}, "should match pattern"),
        ({"files": {"head.safetensors": {"size": MAX_BYTES + 1, "sha256": "ef" * 32}}}, "files have 3000001 bytes"),
        ({"token_levels": LEVELS[1:]}, "token_levels must rise from likely 0"),
        ({"token_levels": LEVELS[:1] * 2}, "token_levels must rise from likely 0"),
        ({"answer_levels": LEVELS[::-1]}, "answer_levels must rise from likely 0"),
        ({"query_levels": LEVELS[1:]}, "query_levels must rise from likely 0"),
        ({"token_levels": [level(0, 0, 0.01), level(0.5, 0, 0.02)]}, "certificates of token_levels must not rise"),
        ({"token_levels": LEVELS * 51}, "at most 100 items"),
        ({"token_levels": [level(0, 1.5, 0.1)]}, "less than or equal to 1"),
        ({"token_levels": [level(0, float("nan"), 0.1)]}, "finite number"),
        (
            {"token_levels": [{**LEVELS[0], "certificate": certificate(delta=0)}]},
            "greater than 0",
        ),
        ({"token_levels": [{**LEVELS[0], "certificate": certificate(prompts=0)}]}, "equal to 1"),
    ],
    ids=str,
)
def test_invalid_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RouterManifest.model_validate(content(**changes))


def test_levels_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        OffloadLevel.model_validate(LEVELS[0]).asked = 0.5  # type: ignore[misc]
