from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from isthmus.models.errors import BundleError, Overloaded
from isthmus.models.onnx_session import (
    INT64,
    TensorSpec,
    check_bounded,
    check_signature,
    open_session,
    translated,
    uses_cuda,
    zeros,
)

X, SCALE, Y = TensorSpec((None, 3)), TensorSpec((), INT64), TensorSpec((None, 3))


def graph(scale: int = TensorProto.INT64) -> bytes:
    """y = x * scale: x (B, 3) and one integer."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3]),
        helper.make_tensor_value_info("scale", scale, []),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 3])]
    nodes = [
        helper.make_node("Cast", ["scale"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "factor"], ["y"]),
    ]
    made = helper.make_graph(nodes, "test", inputs, outputs)
    opsets = [helper.make_opsetid("", 21)]
    data: bytes = helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
    return data


@pytest.mark.parametrize("spinning", [False, True])
@pytest.mark.parametrize("threads", [0, 1])
def test_a_graph_runs(threads: int, spinning: bool) -> None:
    session = open_session(graph(), "double", threads, spinning=spinning)
    (y_B3,) = session.run(None, {"x": np.ones((2, 3), np.float32), "scale": np.array(2, np.int64)})
    np.testing.assert_array_equal(y_B3, np.full((2, 3), 2, np.float32))


@pytest.mark.parametrize("available", [False, True])
@pytest.mark.parametrize("cuda", [None, 1])
def test_cuda_is_chosen_where_it_is_wanted_and_can_be_used(
    monkeypatch: pytest.MonkeyPatch, cuda: int | None, available: bool
) -> None:
    found = ["CUDAExecutionProvider", "CPUExecutionProvider"][not available :]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: found)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda graph, options, providers: providers)
    chosen = open_session(graph(), "double", 1, cuda=cuda)
    on_card = ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 0})
    assert chosen == [*([on_card] if available and cuda is not None else []), "CPUExecutionProvider"]


def test_a_provider_that_could_not_be_loaded_is_not_taken_for_cuda() -> None:
    assert not uses_cuda(open_session(graph(), "double", 1))


def test_what_is_no_graph_is_refused_in_one_line() -> None:
    with pytest.raises(BundleError, match=r"head0\.onnx: not a usable ONNX graph: ") as caught:
        open_session(b"no graph", "head0.onnx", 1)
    assert "\n" not in str(caught.value)


def endless(operator: str) -> bytes:
    """A graph whose loop never ends, one level down in a branch."""
    step = helper.make_tensor_value_info("step", TensorProto.INT64, [])
    on, end, x, y, z, go = (helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("on", "end", *"xyz", "go"))
    again = [helper.make_node("Identity", ["on"], ["end"]), helper.make_node("Not", ["x"], ["y"])]
    loop = helper.make_node(
        operator, ["", "go", "go"], ["z"], body=helper.make_graph(again, "body", [step, on, x], [end, y])
    )
    branch = helper.make_graph([loop], "branch", [], [z])
    choice = helper.make_node("If", ["go"], ["w"], then_branch=branch, else_branch=branch)
    out = helper.make_tensor_value_info("w", TensorProto.BOOL, [])
    made = helper.make_graph([choice], "test", [go], [out])
    opsets = [helper.make_opsetid("", 21)]
    data: bytes = helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
    return data


@pytest.mark.parametrize("operator", ["Loop", "Scan"])
def test_a_graph_that_may_run_for_ever_is_refused(operator: str) -> None:
    data = endless(operator)
    with pytest.raises(BundleError, match=f"head0: the graph has the operator {operator}"):
        open_session(data, "head0", 1)
    padded = data.replace(b"\x22\x04" + operator.encode(), b"\xa2\x80\x00\x84\x80\x80\x00" + operator.encode())
    assert padded != data
    with pytest.raises(BundleError, match=operator):
        check_bounded(padded, "head0")
    check_bounded(data.replace(operator.encode(), b"Sqrt"), "head0")


def test_names_with_the_words_are_no_operators() -> None:
    check_bounded(graph().replace(b"factor", b"Loop_1"), "double")


def test_errors_of_a_run_are_named() -> None:
    session = open_session(graph(), "double", 1)
    with pytest.raises(BundleError, match="double: the graph failed: ") as failed, translated("double"):
        session.run(None, {"x": np.ones((2, 9), np.float32), "scale": np.array(2, np.int64)})
    assert "\n" not in str(failed.value)
    for error in (MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("Failed to allocate memory for 9 GB")):
        with pytest.raises(Overloaded, match="double: not enough memory"), translated("double"):
            raise error


def test_inputs_may_come_in_any_order() -> None:
    check_signature(open_session(graph(), "double", 1), "double", {"scale": SCALE, "x": X}, [Y])


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ({"x": X}, [Y], r"double: inputs are named \['x', 'scale'\], expected \['x'\]"),
        ({"x": X, "scale": SCALE}, [Y, Y], "double: 1 outputs, expected 2"),
        ({"x": TensorSpec((1, 3)), "scale": SCALE}, [Y], r"input x is .*\['B', 3\], expected .*\[1, 3\]"),
        ({"x": TensorSpec((None, None)), "scale": SCALE}, [Y], r"input x .*, expected .*\[any, any\]"),
        ({"x": TensorSpec((None, 3, 1)), "scale": SCALE}, [Y], r"input x .*, expected .*\[any, 3, 1\]"),
        ({"x": X, "scale": TensorSpec(())}, [Y], r"input scale is tensor\(int64\)\[\], expected tensor\(float\)"),
        ({"x": X, "scale": SCALE}, [TensorSpec((None, 4))], r"output y .*, expected .*\[any, 4\]"),
    ],
    ids=["names", "count", "batch of one", "size of any", "axes", "type", "output"],
)
def test_another_signature_is_refused(inputs: dict[str, TensorSpec], outputs: list[TensorSpec], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        check_signature(open_session(graph(), "double", 1), "double", inputs, outputs)


def test_zeros_stay_where_onnx_runtime_keeps_them() -> None:
    found = zeros((1, 2, 3)).numpy()
    assert found.dtype == np.float32 and found.shape == (1, 2, 3) and not found.any()


def test_telemetry_is_off_before_onnx_runtime_is_loaded() -> None:
    program = "import os; import isthmus.models.onnx_session; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
