"""A tiny model and two dictionaries of a few entries."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from tests.bench.tiny_llama import write_tiny_llama

WORDS = ["split", "bridge", "river", "exit", "layer", "token", "cloud", "device"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=6, context=512)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with dictionaries where the packages would be unpacked."""
    work, chance = tmp_path_factory.mktemp("work"), random.Random(0)
    for package, file in (("dict-foldoc", "foldoc.dict.dz"), ("dict-jargon", "jargon.dict.dz")):
        (work / package).mkdir()
        blocks = [f"word{index}\n\n   {{{' '.join(chance.choices(WORDS, k=45))}}}" for index in range(12)]
        (work / package / file).write_bytes(gzip.compress("\n".join([*blocks, "short\n   text"]).encode()))
    return work
