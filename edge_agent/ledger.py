"""The budgets' ledger on disk: one for photos, probes and audits, and for every process of this user.

    reserve an upper bound -> on disk -> send -> settle what was spent; the rest is given back

A process that is killed between the two has spent what it reserved. Time is that since the device booted, which no
setting of the clock moves; a device that was off gains nothing for that time. The file is SQLite, written through to
the disk before anything is sent.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from isthmus.edge_agent.policy.budgets import AMOUNTS, UNLIMITED, Bucket, Budget, Spend, allowance, describe_shortage
from isthmus.edge_agent.state_file import open_state, transaction
from isthmus.models.errors import InvalidInput
from isthmus.models.user_folders import user_folder

HELD_S = 900.0  # after so long a reservation counts as spent: no request lasts longer, whoever made it was killed
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SCHEMA = """
CREATE TABLE IF NOT EXISTS buckets (
  amount TEXT NOT NULL, period_s REAL NOT NULL, level REAL NOT NULL, boot TEXT NOT NULL, seconds REAL NOT NULL,
  PRIMARY KEY (amount, period_s));
CREATE TABLE IF NOT EXISTS holds (
  id TEXT PRIMARY KEY, boot TEXT NOT NULL, since_s REAL NOT NULL,
  bytes REAL NOT NULL, usd REAL NOT NULL, joules REAL NOT NULL, calls REAL NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Moment:
    """Seconds of a clock that is never set, since the `boot` of this name.

    gained_s: what has certainly passed since anything that another boot wrote.
    """

    boot: str
    seconds: float
    gained_s: float


Clock = Callable[[], Moment]
UNKNOWN_BOOT = f"process {uuid.uuid4()}"  # where the system does not name its boots


@cache
def boot_id() -> str | None:
    """What the system calls this boot; None where it does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return None


def boot_clock() -> Moment:
    """The time since the device booted, suspended or not."""
    boot = boot_id()
    if boot is None:
        return Moment(UNKNOWN_BOOT, time.monotonic(), 0.0)
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME)
    return Moment(boot, seconds, seconds)


class Reservation:
    """What may be spent. One that is never settled was spent."""

    def __init__(self, ledger: Ledger, spend: Spend) -> None:
        self.spend, self.id = spend, uuid.uuid4().hex
        self._ledger = ledger
        self._open = True

    def settle(self, spent: Spend) -> None:
        """`spent` is all that was spent; the rest is given back. Only the first call counts."""
        if self._open:
            self._open = False
            self._ledger._settle(self, spent)


@dataclass
class Totals:
    """What was spent since the start, and how many requests were refused for want of a budget."""

    spent: Spend = field(default_factory=Spend)
    refused: int = 0


class Ledger:
    """Reservations against several budgets. Safe to call from several threads and processes.

    Without budgets it allows everything, and touches no disk.
    """

    def __init__(self, budgets: Sequence[Budget] = (), path: Path | None = None, clock: Clock = boot_clock) -> None:
        """A ledger in `path`, which is made if it is missing; in memory without one.

        A budget that is new to the file begins with all that may be spent at once. Raises InvalidInput for a file that
        cannot be read or written.
        """
        self.budgets, self.path, self.totals = tuple(budgets), path, Totals()
        self._clock, self._lock = clock, threading.Lock()
        self._buckets = tuple(Bucket(budget, budget.capacity) for budget in self.budgets)
        self._seen_s = 0.0
        self._file: sqlite3.Connection | None = None
        if self.budgets:
            try:
                self._file = open_state(path, SCHEMA)
                with self._entry():
                    pass
            except (sqlite3.Error, OSError) as error:
                raise InvalidInput(
                    f"the ledger {path} cannot be used: {error}; without it no budget is kept"
                ) from error

    def allowance(self) -> Spend:
        """What may be spent now, as far as this process knows: another may have spent since. Reads no disk."""
        if not self.budgets:
            return UNLIMITED
        return allowance(self._buckets, self._clock().seconds - self._seen_s)

    def buckets(self) -> tuple[Bucket, ...]:
        """Every budget with what is left of it now, for metrics."""
        passed_s = self._clock().seconds - self._seen_s
        return tuple(bucket.refilled(passed_s) for bucket in self._buckets)

    def reserve(self, spend: Spend) -> Reservation | None:
        """Take an upper bound from every budget, on disk when this returns; None where one has less left.

        Also None while the file cannot be written: what is not kept is not spent.
        """
        reservation = Reservation(self, spend)
        if not self.budgets:
            return reservation
        try:
            with self._entry() as file:
                taken = [bucket.reserved(getattr(spend, bucket.budget.amount)) for bucket in self._buckets]
                if any(bucket is None for bucket in taken):
                    self.totals.refused += 1
                    return None
                self._buckets = tuple(bucket for bucket in taken if bucket is not None)
                now = self._clock()
                file.execute(
                    "INSERT INTO holds VALUES (?, ?, ?, ?, ?, ?, ?)", (reservation.id, now.boot, now.seconds, *spend)
                )
        except sqlite3.Error:
            self.totals.refused += 1
            return None
        return reservation

    def spend(self, spend: Spend, share: float = 1.0) -> bool:
        """Whether it may be spent, as that share of what is left at most; if so it is.

        For messages whose end nobody watches, such as probes.
        """
        if any(needed > share * has for needed, has in zip(spend, self.allowance(), strict=True)):
            return False
        reservation = self.reserve(spend)
        if reservation is not None:
            reservation.settle(spend)
        return reservation is not None

    def refusal(self, spend: Spend) -> str:
        """Why `reserve` refused it, in one line."""
        left = self.allowance()
        if all(needed <= has for needed, has in zip(spend, left, strict=True)):
            return f"the ledger {self.path} cannot be written"
        return describe_shortage(spend, left)

    def close(self) -> None:
        """Close the file. What is reserved stays so."""
        if self._file is not None:
            self._file.close()

    def _settle(self, reservation: Reservation, spent: Spend) -> None:
        with self._lock:
            self.totals.spent = self.totals.spent.plus(spent)
        if not self.budgets:
            return
        with suppress(sqlite3.Error), self._entry() as file:  # a failure leaves it reserved, which is spent
            if file.execute("DELETE FROM holds WHERE id = ?", (reservation.id,)).rowcount:
                self._buckets = tuple(
                    bucket.settled(*(float(getattr(each, bucket.budget.amount)) for each in (reservation.spend, spent)))
                    for bucket in self._buckets
                )

    @contextmanager
    def _entry(self) -> Iterator[sqlite3.Connection]:
        """The buckets as they are on disk now; how the block leaves them is on disk after it, or nothing is."""
        assert self._file is not None  # without budgets there are no entries
        with self._lock:
            before, now = self._buckets, self._clock()
            try:
                with transaction(self._file):
                    self._load(self._file, now)
                    yield self._file
                    self._save(self._file, now)
            except BaseException:
                self._buckets = before
                raise
            self._seen_s = now.seconds

    def _load(self, file: sqlite3.Connection, now: Moment) -> None:
        """Read the buckets, let the time since then fill them, and forget reservations that were never settled."""
        file.execute("DELETE FROM holds WHERE boot != ? OR since_s < ?", (now.boot, now.seconds - HELD_S))
        held = file.execute(f"SELECT {', '.join(f'total({amount})' for amount in AMOUNTS)} FROM holds").fetchone()
        holds: dict[str, float] = dict(zip(AMOUNTS, held, strict=True))
        rows = {row[:2]: row[2:] for row in file.execute("SELECT * FROM buckets")}
        self._buckets = tuple(
            Bucket(budget, level, holds[budget.amount]).refilled(passed_s(now, boot, seconds))
            for budget in self.budgets
            for level, boot, seconds in [
                rows.get((budget.amount, budget.period_s), (budget.capacity, now.boot, now.seconds))
            ]
        )

    def _save(self, file: sqlite3.Connection, now: Moment) -> None:
        file.executemany(
            "INSERT OR REPLACE INTO buckets VALUES (?, ?, ?, ?, ?)",
            [(each.budget.amount, each.budget.period_s, each.level, now.boot, now.seconds) for each in self._buckets],
        )


def passed_s(now: Moment, boot: str, seconds: float) -> float:
    """What has certainly passed since that moment of that boot."""
    return now.seconds - seconds if boot == now.boot else now.gained_s


def default_path() -> Path:
    """isthmus/ledger.db in XDG_STATE_HOME or ~/.local/state."""
    return user_folder("state") / "ledger.db"
