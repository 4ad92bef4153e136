"""ONNX graphs of a vision bundle, opened by ONNX Runtime and checked against the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.models.onnx_session import TensorSpec, check_signature, open_session
from isthmus.models.vision.bundle import Bundle


def open_graph(
    bundle: Bundle,
    name: str,
    threads: int,
    inputs: Mapping[str, TensorSpec],
    outputs: Sequence[TensorSpec] | Mapping[str, TensorSpec],
    *,
    cuda: int | None = None,
) -> Any:
    """A session of the bundle's file `name`; `threads` 0 for every core, `cuda` as in `open_session`.

    Raises BundleError when the file is no graph, or has other inputs or outputs than these.
    """
    label = str(bundle.folder / name)
    session = open_session(bundle.read(name), label, threads, cuda=cuda)
    check_signature(session, label, inputs, outputs)
    return session
