"""Opened ONNX graphs, kept on disk: built once, afterwards mapped into memory as ONNX Runtime has laid them out.

    FOLDER/<SHA-256 of the key>/graph.onnx     nodes, optimised for this processor
                               /weights.bin    constants, in the layout that the kernels read
                               /entry.json     the key, and size and SHA-256 of the other two

What is read is verified first; anything else is built again. Entries are written aside and renamed, and only ever
unlinked, so that processes which have one mapped go on with it. Knows no wing, and nothing about what a graph computes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from onnx import ModelProto

from isthmus.models.errors import BundleError
from isthmus.models.onnx_session import SAVED_WEIGHTS, open_session

GRAPH, WEIGHTS, ENTRY, PART = "graph.onnx", SAVED_WEIGHTS, "entry.json", "part-"
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

        The runtime's version and the processor count as parts of the key. Raises BundleError, and as `build`.
        """
        key = {**key, "label": label, "runtime": onnxruntime.__version__, "processor": processor()}
        path = self.folder and self.folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        session = self._load(path, key, label, threads) if path else None
        if session is not None:
            return session
        graph = build().SerializeToString()
        if path and self._save(path, key, label, graph):
            session = self._load(path, key, label, threads)
        return open_session(graph, label, threads, spinning=True) if session is None else session

    def _load(self, path: Path, key: Key, label: str, threads: int) -> Any | None:
        """A session of an entry, which is marked as used; None where there is no sound one."""
        try:
            check_private(path.parent)
            graph = verified(path, key)
            os.utime(path / ENTRY)
            return open_session(graph, label, threads, spinning=True, weights=path)
        except (OSError, ValueError, BundleError):
            return None

    def _save(self, path: Path, key: Key, label: str, graph: bytes) -> bool:
        """Whether an entry was made. Where the folder or the disk does not allow it, there is none."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(path.parent)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=PART) as part:
                written = Path(part) / "entry"
                size = write(written, key, label, graph)
                self._evict(path.parent, size)
                shutil.rmtree(path, ignore_errors=True)  # it was not sound
                os.rename(written, path)
            return True
        except (OSError, BundleError):
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


def write(path: Path, key: Key, label: str, graph: bytes) -> int:
    """Write an entry and return its size in bytes. Raises OSError, BundleError."""
    path.mkdir(mode=0o700)
    open_session(graph, label, 1, save=path / GRAPH)
    (path / WEIGHTS).touch()  # a graph without large constants has none
    entry = {"key": key, "graph": identity(path / GRAPH), "weights": identity(path / WEIGHTS)}
    (path / ENTRY).write_text(json.dumps(entry), encoding="utf-8")
    return sum(file.stat().st_size for file in path.iterdir())


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


def processor() -> str:
    """What the layout of constants depends on: the architecture, and the instructions that this processor has."""
    found = [platform.machine()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line.partition(":") for line in lines]
        wanted = ("flags", "Features", "model name", "CPU part")
        found += sorted({f"{name.strip()}:{value.strip()}" for name, _, value in named if name.strip() in wanted})
    return hashlib.sha256("\n".join(found).encode()).hexdigest()
