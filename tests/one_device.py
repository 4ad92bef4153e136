"""A device without values stands for a CUDA device, and every operation on tensors of both sides is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isthmus.models import torch_device

META = torch.device("meta")
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class OneDevice(TorchDispatchMode):
    """Raises RuntimeError for an operation, other than a copy, whose tensors are on several devices."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1 and func not in COPIES:
            raise RuntimeError(f"{func} on tensors of {', '.join(sorted(map(str, devices)))}")
        return func(*args, **(kwargs or {}))


def without_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory is not pinned, which needs CUDA."""
    monkeypatch.setattr(torch_device, "pinned", lambda tensor: tensor)
