"""State on disk: all of a transaction or nothing, in a file or in memory."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from isthmus.edge_agent.state_file import open_state, transaction

SCHEMA = "CREATE TABLE IF NOT EXISTS words (word TEXT PRIMARY KEY);"


def words(file: sqlite3.Connection) -> list[str]:
    return [word for (word,) in file.execute("SELECT word FROM words ORDER BY word")]


def test_a_transaction_is_on_disk_or_was_never(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "state.db"
    file, other = open_state(path, SCHEMA), open_state(path, SCHEMA)
    with transaction(file):
        file.execute("INSERT INTO words VALUES ('head')")
    assert words(other) == ["head"]
    with pytest.raises(ValueError, match="stop"), transaction(file):
        file.execute("INSERT INTO words VALUES ('tail')")
        raise ValueError("stop")
    with transaction(other):
        assert words(other) == ["head"]
    assert file.execute("PRAGMA synchronous").fetchone() == (2,)


def test_without_a_path_it_is_in_memory() -> None:
    file = open_state(None, SCHEMA)
    with transaction(file):
        file.execute("INSERT INTO words VALUES ('head')")
    assert words(file) == ["head"] and words(open_state(None, SCHEMA)) == []


def test_a_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_text("not a database, but long enough to be read as the header of one" * 20)
    with pytest.raises(sqlite3.DatabaseError):
        open_state(path, SCHEMA)
