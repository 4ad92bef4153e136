"""Audited pairs on disk: bounded, shared by every process that uses the bundle, and whole after a kill.

    pairs      the last MOST_PAIRS, oldest first
    state      what the audit has found so far, and thresholds that were made from pairs

SQLite with a write-ahead log. Where the file cannot be used, all of it is kept in memory, and a warning says so.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isthmus.edge_agent.policy.audit import Pair
from isthmus.models.errors import InvalidInput

MOST_PAIRS = 20_000  # about 2 MB
BUSY_S = 5.0  # that a process waits for another one's entry
SCHEMA = """
CREATE TABLE IF NOT EXISTS pairs (
  id INTEGER PRIMARY KEY AUTOINCREMENT, alarm INTEGER NOT NULL, scores TEXT NOT NULL, answers TEXT NOT NULL,
  cloud INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
log = logging.getLogger(__name__)


class AuditedPairs:
    """Pairs of one bundle at one precision. Safe to call from several threads and processes."""

    def __init__(self, path: Path) -> None:
        """Made where it is missing. Raises InvalidInput for a file that cannot be used."""
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = opened(path)
        except (OSError, sqlite3.Error) as error:
            raise InvalidInput(f"the audited pairs in {path} cannot be used: {error}") from error

    @classmethod
    def kept_in(cls, path: Path) -> AuditedPairs:
        """In the file, or in memory where it cannot be used: an audit never stops an agent."""
        try:
            return cls(path)
        except InvalidInput as error:
            log.warning("%s; they are kept in memory until the agent ends", error)
            return cls(Path(":memory:"))

    @contextmanager
    def entry(self) -> Iterator[dict[str, Any]]:
        """What is under `state` now; how the block leaves it is on disk after it, or nothing is."""
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                state = dict(readable(self._file.execute("SELECT key, value FROM state")))
                yield state
                changed = [(key, json.dumps(value)) for key, value in state.items()]
                self._file.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", changed)
                self._file.execute("COMMIT")
            except BaseException:
                self._file.execute("ROLLBACK")
                raise

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


def opened(path: Path) -> sqlite3.Connection:
    """A connection for several threads. Raises OSError, sqlite3.Error."""
    file = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        file.execute("PRAGMA journal_mode = WAL")
        file.executescript(SCHEMA)
    except BaseException:
        file.close()
        raise
    return file


def pairs_path(folder: Path | None, bundle: str, fingerprint: str, precision: str) -> Path:
    """A file for each bundle and precision in `folder`, or in isthmus in XDG_STATE_HOME or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME")
    folder = folder or (Path(state) if state else Path.home() / ".local/state") / "isthmus"
    return folder / f"audit-{bundle}-{fingerprint[:12]}-{precision}.db"
