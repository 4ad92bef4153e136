"""ONNX graphs on disk: built once, afterwards opened with their constants mapped into memory.

    FOLDER/<SHA-256 of the key>/graph.onnx     nodes and small constants
                               /weights.bin    large constants
                               /entry.json     the key, and size and SHA-256 of the other two

What is read is verified first; anything else is built again. Entries are written aside and renamed, and only ever
unlinked, so that processes which have one mapped go on with it. Knows no wing, and nothing about what a graph computes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from onnx import ModelProto, TensorProto, helper

from isthmus.models.errors import BundleError
from isthmus.models.onnx_session import open_session

GRAPH, WEIGHTS, ENTRY, PART = "graph.onnx", "weights.bin", "entry.json", "part-"
SMALL_BYTES = 1024  # below it a constant stays in its graph
PAGE_BYTES = 4096  # of memory that is mapped
MAX_ENTRY_BYTES = 1 << 16  # of entry.json
MAX_GRAPH_BYTES = 1 << 28  # of graph.onnx, which is read into memory; its constants are apart
MAX_CACHE_BYTES = 4 << 30  # of all entries: above it those go that were not opened for longest
ABANDONED_S = 3600.0  # after which what a process was writing is no longer its own

Key = Mapping[str, str | int | list[int]]


@dataclass(frozen=True)
class GraphCache:
    """A folder of this user alone, which need not exist or be writable; None keeps nothing. Safe between processes."""

    folder: Path | None
    max_bytes: int = MAX_CACHE_BYTES

    def open(self, key: Key, label: str, threads: int, build: Callable[[], ModelProto]) -> Any:
        """A session of the graph that `key` stands for, whose threads spin; `build` makes it where it is not here.

        Raises BundleError, and as `build`.
        """
        key = {**key, "label": label}
        path = self.folder and self.folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        session = self._load(path, key, label, threads) if path else None
        if session is not None:
            return session
        graph = build()
        if path and self._save(path, key, graph):
            session = self._load(path, key, label, threads)
        return session or open_session(graph.SerializeToString(), label, threads, spinning=True)

    def _load(self, path: Path, key: Key, label: str, threads: int) -> Any | None:
        """A session of an entry, which is marked as used; None where there is no sound one."""
        try:
            check_private(path.parent)
            graph = verified(path, key)
            os.utime(path / ENTRY)
            return open_session(graph, label, threads, spinning=True, weights=path)
        except (OSError, ValueError, RecursionError, BundleError):
            return None

    def _save(self, path: Path, key: Key, graph: ModelProto) -> bool:
        """Whether an entry was made. Where the folder or the disk does not allow it, there is none."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(path.parent)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=PART) as part:
                written = Path(part) / "entry"
                size = write(written, key, graph)
                self._evict(path.parent, size)
                shutil.rmtree(path, ignore_errors=True)  # it was not sound
                os.rename(written, path)
            return True
        except OSError:
            return path.exists()  # another process may have been first

    def _evict(self, folder: Path, added_bytes: int) -> None:
        """Make room for `added_bytes`. Raises OSError where it cannot be made."""
        if added_bytes > self.max_bytes:
            raise OSError(f"{added_bytes} bytes, the cache holds at most {self.max_bytes}")
        entries = []
        for path in folder.iterdir():
            with suppress(OSError):  # another process may remove it now
                if not path.name.startswith(PART):
                    files = [file.stat() for file in path.iterdir()]
                    used_s = (path / ENTRY).stat().st_mtime if (path / ENTRY).exists() else 0.0
                    entries.append((used_s, sum(file.st_size for file in files), path))
                elif time.time() - path.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(path, ignore_errors=True)
        total = added_bytes + sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            shutil.rmtree(path, ignore_errors=True)
            total -= size


def check_private(folder: Path) -> None:
    """Raise OSError where another user could write to a folder: a graph runs with this one's rights."""
    found = folder.stat()
    if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or found.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written by other users")


def verified(path: Path, key: Key) -> bytes:
    """The graph of an entry whose files are those that were written for `key`. Raises OSError, ValueError."""
    entry = json.loads(read(path / ENTRY, MAX_ENTRY_BYTES))
    if not isinstance(entry, dict) or entry.get("key") != key or entry.get("weights") != identity(path / WEIGHTS):
        raise ValueError(f"{path.name}: not what was written")
    graph = read(path / GRAPH, MAX_GRAPH_BYTES)
    if entry.get("graph") != [len(graph), hashlib.sha256(graph).hexdigest()]:
        raise ValueError(f"{path.name}: not the graph that was written")
    return graph


def write(path: Path, key: Key, graph: ModelProto) -> int:
    """Write an entry and return its size in bytes. Raises OSError."""
    path.mkdir(mode=0o700)
    with (path / WEIGHTS).open("wb") as weights:
        nodes = without_constants(graph, weights)
    (path / GRAPH).write_bytes(nodes.SerializeToString())
    entry = {"key": key, "graph": identity(path / GRAPH), "weights": identity(path / WEIGHTS)}
    (path / ENTRY).write_text(json.dumps(entry), encoding="utf-8")
    return sum(file.stat().st_size for file in path.iterdir())


def without_constants(model: ModelProto, weights: BinaryIO) -> ModelProto:
    """The model with its large constants in a file, each at the start of a page. Raises OSError."""
    graph, constants = model.graph, []
    for constant in graph.initializer:
        if len(constant.raw_data) < SMALL_BYTES:
            constants.append(constant)
            continue
        weights.write(bytes(-weights.tell() % PAGE_BYTES))
        place = {"location": WEIGHTS, "offset": weights.tell(), "length": len(constant.raw_data)}
        weights.write(constant.raw_data)
        moved = TensorProto(name=constant.name, dims=constant.dims, data_type=constant.data_type)
        moved.data_location = TensorProto.EXTERNAL
        for name, value in place.items():
            moved.external_data.add(key=name, value=str(value))
        constants.append(moved)
    made = helper.make_graph(graph.node, graph.name, graph.input, graph.output, constants)
    return helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)


def read(file: Path, limit_bytes: int) -> bytes:
    """The content of a file. Raises OSError, also for more than `limit_bytes`."""
    with file.open("rb") as opened:
        if (size := os.fstat(opened.fileno()).st_size) > limit_bytes:
            raise OSError(f"{file.name} has {size} bytes, at most {limit_bytes}")
        return opened.read(limit_bytes)


def identity(file: Path) -> list[int | str]:
    """Size and SHA-256 of a file. Raises OSError."""
    with file.open("rb") as opened:
        return [os.fstat(opened.fileno()).st_size, hashlib.file_digest(opened, "sha256").hexdigest()]
