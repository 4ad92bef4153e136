"""ONNX graphs of a bundle, opened by ONNX Runtime."""

from __future__ import annotations

import os
from typing import Any

from isthmus.models.bundle.bundle import Bundle
from isthmus.models.errors import BundleError

# ONNX Runtime reports to its makers unless told not to before it is loaded; its own switch comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime


def open_graph(bundle: Bundle, name: str, threads: int) -> Any:
    """An `onnxruntime.InferenceSession`; `threads` 0 for every core. Raises BundleError when the file is no graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not eat the battery
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(bundle.read(name), options, providers=["CPUExecutionProvider"])
    except BundleError:
        raise
    except Exception as error:  # onnxruntime's own classes share no public base
        reason = str(error).splitlines()[0][:200]
        raise BundleError(f"{bundle.folder / name}: not a usable ONNX graph: {reason}") from error
