"""SQLite files of an agent's state: shared by processes, on disk at every commit, and whole after a kill."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BUSY_S = 5.0  # that a process waits for another one's entry


def open_state(path: Path | None, schema: str) -> sqlite3.Connection:
    """A connection for several threads to a file with these tables, or to memory. Raises OSError, sqlite3.Error."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect(path or ":memory:", timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = FULL")
        file.executescript(schema)
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def transaction(file: sqlite3.Connection) -> Iterator[None]:
    """What the block writes is on disk after it, or nothing of it is. Raises sqlite3.Error."""
    file.execute("BEGIN IMMEDIATE")
    try:
        yield
        file.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            file.execute("ROLLBACK")
        raise
