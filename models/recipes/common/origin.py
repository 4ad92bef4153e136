"""Hashes of what a run is made from: `Run.of` ties checkpoints to them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule

SHOWN = 16  # hexadecimal digits


def of_arrays(*arrays: NDArray[Any] | Tensor | None) -> str:
    """A hash of values, types and shapes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{None if array is None else (array.dtype, tuple(array.shape))}".encode())
        if isinstance(array, Tensor):
            found.update(array.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif array is not None:
            found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:SHOWN]


def of_files(paths: Iterable[Path]) -> str:
    """A hash of the contents of files, in their order."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:SHOWN]


def of_graph(graph: GraphModule) -> str:
    """A hash of a network: its operations, and every weight, buffer and constant that they read."""
    read = [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    values = [_attribute(graph, name) for name in read]
    operations = hashlib.sha256(graph.code.encode()).hexdigest()
    return of_arrays(*values, np.frombuffer(operations.encode(), np.uint8))


def _attribute(graph: GraphModule, name: str) -> Tensor | None:
    value: Any = graph
    for step in name.split("."):
        value = getattr(value, step)
    return value if isinstance(value, Tensor) else None
