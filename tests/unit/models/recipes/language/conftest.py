"""Tiny models, what one of them answers, and two dictionaries of a few entries."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.teacher import TeacherOutputs, run_teacher
from tests.bench.tiny_llama import write_tiny_llama

LAYERS = 3
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


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    """Three layers. Read only, as the next two."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS)
    return Llama.load(Checkpoint.open(folder), torch.float32)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    lengths = (9, 30, 17, 30, 12, 25)
    return Corpus.from_sequences([(rng.integers(3, 259, length).tolist(), length // 2) for length in lengths])


@pytest.fixture(scope="session")
def teacher(model: Llama, corpus: Corpus) -> TeacherOutputs:
    return run_teacher(model, corpus, range(LAYERS + 1))
