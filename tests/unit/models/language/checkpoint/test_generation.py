from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.checkpoint.generation import folder_sampling, gguf_sampling
from isthmus.models.messages import Sampling
from tests.bench.tiny_llama import write_tiny_llama


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (None, Sampling(1.0, 1.0)),
        ({}, Sampling(1.0, 1.0)),
        ({"eos_token_id": 2, "temperature": None}, Sampling(1.0, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(0.6, 0.9)),
        ({"temperature": 0.7, "top_k": 20}, Sampling(0.7, 1.0)),
        ({"do_sample": False, "temperature": 0.6}, Sampling(0.0, 1.0)),
    ],
)
def test_of_a_folder(tmp_path: Path, stated: dict[str, Any] | None, expected: Sampling) -> None:
    if stated is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert folder_sampling(tmp_path) == expected


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"temperature": "hot"}, "temperature is hot, expected a number"),
        ({"top_p": True}, "top_p is True, expected a number"),
        ({"temperature": 3}, "temperature is 3.0, expected 0 to 2"),
        ({"top_p": 0}, "top_p is 0.0, expected above 0"),
    ],
)
def test_what_cannot_be_sampled_by_is_named(tmp_path: Path, stated: dict[str, Any], words: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    with pytest.raises(BundleError, match=f"generation_config.json: {words}"):
        folder_sampling(tmp_path)


def test_of_a_gguf_header() -> None:
    assert gguf_sampling({}) == Sampling(1.0, 1.0)
    assert gguf_sampling({"general.sampling.temp": 0.5, "general.sampling.top_p": 0.8}) == Sampling(0.5, 0.8)


def test_of_a_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny")
    fingerprint = Checkpoint.open(folder).fingerprint
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25}))
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.sampling, checkpoint.fingerprint) == (Sampling(0.25, 1.0), fingerprint)
    assert Checkpoint.open("smollm2").sampling == Sampling(0.2, 0.9)
