"""Audited pairs on disk: bounded, shared by every process that uses the bundle, and whole after a kill.

    pairs      the last MOST_PAIRS, oldest first
    state      what the audit has found so far, and thresholds that were made from pairs

SQLite with a write-ahead log. Where the file cannot be used, all of it is kept in memory, and a warning says so.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isthmus.edge_agent.policy.audit import Pair
from isthmus.edge_agent.state_file import open_state, transaction
from isthmus.models.errors import InvalidInput
from isthmus.models.user_folders import user_folder

MOST_PAIRS = 20_000  # about 2 MB
SCHEMA = """
CREATE TABLE IF NOT EXISTS pairs (
  id INTEGER PRIMARY KEY AUTOINCREMENT, alarm INTEGER NOT NULL, scores TEXT NOT NULL, answers TEXT NOT NULL,
  cloud INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
log = logging.getLogger(__name__)


class AuditedPairs:
    """Pairs of one bundle at one precision. Safe to call from several threads and processes."""

    def __init__(self, path: Path | None) -> None:
        """Made where it is missing; in memory without a path. Raises InvalidInput for a file that cannot be used."""
        self._lock = threading.Lock()
        try:
            self._file = open_state(path, SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise InvalidInput(f"the audited pairs in {path} cannot be used: {error}") from error

    @classmethod
    def kept_in(cls, path: Path) -> AuditedPairs:
        """In the file, or in memory where it cannot be used: an audit never stops an agent."""
        try:
            return cls(path)
        except InvalidInput as error:
            log.warning("%s; they are kept in memory until the agent ends", error)
            return cls(None)

    @contextmanager
    def entry(self) -> Iterator[dict[str, Any]]:
        """What is under `state` now; how the block leaves it is on disk after it, or nothing is."""
        with self._lock, transaction(self._file):
            state = dict(readable(self._file.execute("SELECT key, value FROM state")))
            yield state
            changed = [(key, json.dumps(value)) for key, value in state.items()]
            self._file.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", changed)

    def add(self, pair: Pair, alarm: bool) -> None:
        """Within `entry`: one more pair; `alarm`: whether it came while the alarm was on. The oldest are dropped."""
        self._file.execute(
            "INSERT INTO pairs (alarm, scores, answers, cloud) VALUES (?, ?, ?, ?)",
            (alarm, json.dumps(pair.scores), json.dumps(pair.answers), pair.cloud),
        )
        self._file.execute(
            "DELETE FROM pairs WHERE id <= (SELECT max(id) FROM pairs) - ?",
            (MOST_PAIRS,),
        )

    def alarm_ended(self) -> None:
        """Within `entry`: the next alarm counts its pairs anew."""
        self._file.execute("UPDATE pairs SET alarm = 0 WHERE alarm")

    def pairs(self, in_alarm: bool) -> list[Pair]:
        """Oldest first; with `in_alarm` only those since the alarm, which a shift caused."""
        rows = self._file.execute("SELECT scores, answers, cloud FROM pairs WHERE alarm >= ? ORDER BY id", (in_alarm,))
        return [Pair(tuple(json.loads(scores)), tuple(json.loads(answers)), cloud) for scores, answers, cloud in rows]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


def readable(rows: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
    """What is JSON of the rows; something else was not written here, and begins anew."""
    for key, value in rows:
        try:
            yield key, json.loads(value)
        except ValueError as error:
            log.warning("%s in the audited pairs is not readable: %s", key, error)


def pairs_path(folder: Path | None, bundle: str, fingerprint: str, precision: str) -> Path:
    """A file for each bundle and precision in `folder`, or in isthmus in XDG_STATE_HOME or ~/.local/state."""
    return (folder or user_folder("state")) / f"audit-{bundle}-{fingerprint[:12]}-{precision}.db"
