"""A router bundle for a tiny language model on both sides, whose levels are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from isthmus.models.bundle.files import write_bundle
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.router.answers import ANSWER_FEATURES, QUERY_FEATURES, AnswerVerifier, LogisticHead
from isthmus.models.language.router.manifest import OffloadLevel, RouterManifest
from isthmus.models.messages import ModelInfo
from tests.tiny_handoff import early_logits, head_tensors

OFFLOADED = 0.2  # of the local model's tokens, about


def level(likely: float, asked: float, wrong: float) -> OffloadLevel:
    """A level that is certified for what was measured."""
    return OffloadLevel.model_validate(level_content(likely, asked, wrong))


def level_content(likely: float, asked: float, wrong: float) -> dict[str, Any]:
    return {
        "likely": likely,
        "asked": asked,
        "wrong": {"value": wrong, "low": wrong, "high": wrong, "samples": 100},
        "certificate": {"epsilon": wrong, "delta": 0.1, "prompts": 100},
    }


COMMON = {
    "kind": "router",
    "name": "tiny-router",
    "licence": "Apache-2.0",
    "training": {
        "command": "none",
        "seed": 0,
        "seconds": 1.0,
        "machine": "none",
        "data": "random tokens",
        "versions": {"numpy": np.__version__},
    },
    "scores": {},
}
LEVELS = [level_content(0.0, 0.0, 0.4), level_content(0.5, OFFLOADED, 0.1)]


def write_tiny_verifier(folder: Path, checkpoint: Checkpoint, cloud: ModelInfo, bias: float) -> Path:
    """A bundle for whole answers of the checkpoint in 8 bits beside any cloud. `bias`: what every answer scores."""
    heads = [LogisticHead(np.zeros(inputs, np.float32), bias) for inputs in (QUERY_FEATURES, ANSWER_FEATURES)]
    weights, tokenizer = checkpoint.fingerprint.hex(), cloud.tokenizer.sha256.hex()
    data = safetensors.numpy.save(AnswerVerifier(*heads).tensors())
    manifest = {
        **COMMON,
        "device": {"name": checkpoint.name, "weights": weights, "bits": 8},
        "cloud": {"name": cloud.name, "tokenizer": tokenizer},
        "verifier": "answers.safetensors",
        "answer_levels": LEVELS,
    }
    return write_bundle(folder, manifest, {"answers.safetensors": data}, RouterManifest)


def write_tiny_router(folder: Path, checkpoint: Checkpoint, **changes: Any) -> Path:
    """A bundle of the checkpoint in 8 bits against itself; `changes`: of the manifest."""
    tensors = head_tensors(early_logits(checkpoint, checkpoint.config.layers, 0)[1], OFFLOADED)
    weights = checkpoint.fingerprint.hex()
    manifest: dict[str, Any] = {
        **COMMON,
        "device": {"name": checkpoint.name, "weights": weights, "bits": 8},
        "cloud": {"name": checkpoint.name, "tokenizer": checkpoint.tokenizer.fingerprint.hex(), "weights": weights},
        "head": "head.safetensors",
        "token_levels": LEVELS,
        **changes,
    }
    return write_bundle(folder, manifest, {"head.safetensors": safetensors.numpy.save(tensors)}, RouterManifest)
