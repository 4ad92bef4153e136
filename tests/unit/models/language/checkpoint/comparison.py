"""What several tests of checkpoints compare with, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.models.errors import BundleError
from isthmus.models.language.checkpoint.checkpoint import Blocks, Checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def state_dict(transformers: Any, *place: Any, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(*place, **options)
    return {name: values.float().numpy() for name, values in model.state_dict().items()}


def expand(blocks: Blocks) -> np.ndarray[Any, Any]:
    return blocks.codes_NK * blocks.scale_NG.repeat(32, axis=1) + blocks.minimum_NG.repeat(32, axis=1)


def refuses(source: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Checkpoint.open(source)
