"""Graphs on disk: made once, verified before use, and never needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from isthmus.models import onnx_cache
from isthmus.models.errors import BundleError
from isthmus.models.onnx_cache import ENTRY, GRAPH, PART, WEIGHTS, GraphCache

Floats = NDArray[np.float32]
WEIGHT = np.arange(1024, dtype=np.float32).reshape(32, 32)


def product(weight: Floats = WEIGHT) -> ModelProto:
    """y = x @ weight: x (B, 32)."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 32]) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "test", ends[:1], ends[1:], [numpy_helper.from_array(weight, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


class Built:
    """Counts how often a graph is made."""

    def __init__(self, weight: Floats = WEIGHT) -> None:
        self.times, self._weight = 0, weight

    def __call__(self) -> ModelProto:
        self.times += 1
        return product(self._weight)


def opened(
    folder: Path | None, build: Callable[[], ModelProto], name: str = "a", **settings: Any
) -> np.ndarray[Any, Any]:
    """One row of the product of the session that the cache gives."""
    session = GraphCache(folder, **settings).open({"model": name}, "product", 1, build)
    row: Floats = session.run(None, {"x": np.eye(1, 32, 3, dtype=np.float32)})[0][0]
    return row


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_graph_is_made_once(tmp_path: Path) -> None:
    build, folder = Built(), tmp_path / "new" / "graphs"
    rows = [opened(folder, build) for _ in range(3)]
    assert build.times == 1 and all(np.array_equal(row_N, WEIGHT[3]) for row_N in rows)
    (entry,) = entries(folder)
    assert sorted(file.name for file in entry.iterdir()) == [ENTRY, GRAPH, WEIGHTS]
    assert WEIGHT.nbytes <= (entry / WEIGHTS).stat().st_size and (entry / GRAPH).stat().st_size < WEIGHT.nbytes


def test_only_this_user_reads_it(tmp_path: Path) -> None:
    opened(tmp_path / "graphs", Built())
    (entry,) = entries(tmp_path / "graphs")
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "graphs", entry)] == [0o700, 0o700]


def test_what_differs_has_an_entry_of_its_own(tmp_path: Path) -> None:
    opened(tmp_path, Built())
    assert np.array_equal(opened(tmp_path, Built(WEIGHT + 1), "b"), WEIGHT[3] + 1)
    assert len(entries(tmp_path)) == 2


def test_without_a_folder_nothing_is_kept() -> None:
    build = Built()
    assert np.array_equal(opened(None, build), opened(None, build)) and build.times == 2


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [tear, flip, Path.unlink, a_folder, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, ENTRY])
def test_a_damaged_entry_is_made_again(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    opened(tmp_path, Built())
    damage(entries(tmp_path)[0] / name)
    again, later = Built(), Built()
    assert np.array_equal(opened(tmp_path, again), WEIGHT[3]) and again.times == 1
    assert np.array_equal(opened(tmp_path, later), WEIGHT[3]) and later.times == 0
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    "content", ["[]", "null", "{", "{}", '{"key": {}}', "[" * 60_000, "9" * 70_000, '{"graph": [0, ""]}', "\udc80"]
)
def test_a_hostile_description_is_not_believed(tmp_path: Path, content: str) -> None:
    opened(tmp_path, Built())
    (entries(tmp_path)[0] / ENTRY).write_bytes(content.encode("utf-8", "surrogateescape"))
    again = Built()
    assert np.array_equal(opened(tmp_path, again), WEIGHT[3]) and again.times == 1


def test_an_entry_of_another_key_is_not_believed(tmp_path: Path) -> None:
    """Even whole: its name does not make it the graph of that model."""
    opened(tmp_path, Built(), "a")
    (other,) = entries(tmp_path)
    kept = tmp_path.with_name("kept")
    shutil.move(other, kept)
    opened(tmp_path, Built(WEIGHT + 1), "b")
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    shutil.move(kept, entry)
    assert np.array_equal(opened(tmp_path, Built(WEIGHT + 1), "b"), WEIGHT[3] + 1)


def test_a_sound_entry_that_the_runtime_refuses_is_made_again(tmp_path: Path) -> None:
    opened(tmp_path, Built())
    (entry,) = entries(tmp_path)
    (entry / GRAPH).write_bytes(b"no graph")
    described = json.loads((entry / ENTRY).read_text()) | {"graph": onnx_cache.identity(entry / GRAPH)}
    (entry / ENTRY).write_text(json.dumps(described))
    again = Built()
    assert np.array_equal(opened(tmp_path, again), WEIGHT[3]) and again.times == 1


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path, mode: int) -> None:
    folder, build = tmp_path / "graphs", Built()
    opened(folder, build)
    folder.chmod(mode)
    assert np.array_equal(opened(folder, build), WEIGHT[3]) and build.times == 2


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Built()
    opened(tmp_path, build)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert np.array_equal(opened(tmp_path, build), WEIGHT[3]) and build.times == 2


def test_a_folder_that_cannot_be_made_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert np.array_equal(opened(tmp_path / "file", Built()), WEIGHT[3])
    assert np.array_equal(opened(tmp_path / "file" / "graphs", Built()), WEIGHT[3])


def test_a_full_disk_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_cache, "write", full)
    assert np.array_equal(opened(tmp_path, Built()), WEIGHT[3]) and entries(tmp_path) == []


def test_those_that_were_not_opened_for_longest_go(tmp_path: Path) -> None:
    opened(tmp_path, Built(), "first")
    (first,) = entries(tmp_path)
    size = sum(file.stat().st_size for file in first.iterdir())
    room = {"max_bytes": 2 * size + size // 2}
    opened(tmp_path, Built(), "second", **room)
    (second,) = set(entries(tmp_path)) - {first}
    for entry, used_s in ((first, 100), (second, 200)):
        os.utime(entry / ENTRY, (used_s, used_s))
    opened(tmp_path, again := Built(), "first", **room)  # so that the second was not opened for longest
    opened(tmp_path, Built(), "third", **room)
    assert again.times == 0 and first.exists() and not second.exists() and len(entries(tmp_path)) == 2


def test_an_entry_above_the_limit_is_not_kept(tmp_path: Path) -> None:
    opened(tmp_path, Built(), "a")
    assert np.array_equal(opened(tmp_path, Built(), "b", max_bytes=4000), WEIGHT[3])
    assert len(entries(tmp_path)) == 1


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    for name, age_s in ((f"{PART}old", 1e9), (f"{PART}new", 0.0)):
        (tmp_path / name).mkdir()
        if age_s:
            os.utime(tmp_path / name, (0, 0))
    opened(tmp_path, Built())
    assert [path.name for path in entries(tmp_path) if path.name.startswith(PART)] == [f"{PART}new"]


def test_an_entry_that_goes_in_use_stays_readable(tmp_path: Path) -> None:
    session = GraphCache(tmp_path).open({"model": "a"}, "product", 1, Built())
    shutil.rmtree(entries(tmp_path)[0])
    assert np.array_equal(session.run(None, {"x": np.eye(32, dtype=np.float32)})[0], WEIGHT)


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both answer, one entry is left, and it is sound."""
    program = (
        "import sys, pathlib; from tests.unit.models.test_onnx_cache import *\n"
        "sys.stdin.read(); print(opened(pathlib.Path(sys.argv[1]), Built())[5])"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate("go", timeout=60)[0].strip() for process in both]
    opened(tmp_path, later := Built())
    assert answers == ["101.0", "101.0"] and len(entries(tmp_path)) == 1 and later.times == 0


def test_a_model_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    def broken() -> ModelProto:
        raise BundleError("a matrix has 24 columns")

    with pytest.raises(BundleError, match="24 columns"):
        opened(tmp_path, broken)
    with pytest.raises(BundleError, match="product: not a usable ONNX graph"):
        opened(tmp_path, lambda: helper.make_model(helper.make_graph([helper.make_node("No", [], ["y"])], "g", [], [])))


def total(side: int) -> tuple[ModelProto, Floats]:
    """y = x + three constants, and their sum: all (side, side)."""
    weight = np.random.default_rng(side).integers(-9, 9, (side, side)).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in "xy"]
    constants = [numpy_helper.from_array(weight + index, f"w{index}") for index in range(3)]
    graph = helper.make_graph(
        [helper.make_node("Sum", ["x", "w0", "w1", "w2"], ["y"])], "test", ends[:1], ends[1:], constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), 3 * weight + 3


@pytest.mark.parametrize("side", [1, 15, 16, 17, 100])
def test_constants_keep_their_bits(tmp_path: Path, side: int) -> None:
    """Small ones stay in the graph; large ones are mapped, from the start of a page."""
    model, expected = total(side)
    for _ in range(2):
        session = GraphCache(tmp_path).open({}, "sum", 1, lambda: model)
        zeros = np.zeros((side, side), np.float32)
        np.testing.assert_array_equal(session.run(None, {"x": zeros})[0], expected)
    if side > 15 and (maps := Path("/proc/self/maps")).exists():
        assert f"{entries(tmp_path)[0].name}/{WEIGHTS}" in maps.read_text()
