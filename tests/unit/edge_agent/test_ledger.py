from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest

from isthmus.edge_agent.ledger import HELD_S, Ledger, Moment, Reservation, boot_clock, default_path
from isthmus.edge_agent.policy.budgets import DAY_S, HOUR_S, UNLIMITED, Budget, Spend
from isthmus.models.errors import InvalidInput

HOURLY = Budget("bytes", 1000, HOUR_S)
BUDGETS = (HOURLY, Budget("calls", 60, HOUR_S), Budget("bytes", 15_000, DAY_S))
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # what is killed there need not reach a disk


class Device:
    """A device's true time, its boots, and its clock since the last of them."""

    def __init__(self) -> None:
        self.true_s, self.booted_s, self.boots = 0.0, -5.0, 0

    def now(self) -> Moment:
        seconds = self.true_s - self.booted_s
        return Moment(f"boot {self.boots}", seconds, seconds)

    def wait(self, seconds: float) -> None:
        self.true_s += seconds

    def reboot(self, off_s: float) -> None:
        self.true_s += off_s
        self.booted_s, self.boots = self.true_s, self.boots + 1


class Owner:
    """A device whose owner sends as much as the ledger lets through, and to whom everything happens."""

    def __init__(self, seed: int, path: Path) -> None:
        self.random, self.device, self.path = Random(seed), Device(), path
        self.held: list[tuple[Reservation, Spend, float]] = []
        self.early: list[tuple[float, Spend]] = []  # what was spent, when it was reserved
        self.late: list[tuple[float, Spend]] = []  # and when it was settled: it happens somewhere in between
        self.ledger = Ledger(BUDGETS, path, self.device.now)

    def reserve(self) -> None:
        size = self.random.choice((1.0, 1.0, 0.5)) * min(max(self.ledger.allowance().bytes, 0.0), 100.0)
        if (reserved := self.ledger.reserve(Spend(size, calls=self.random.choice((0, 1))))) is not None:
            share = self.random.choice((0.0, 1.0, 1.0, 1.0))
            self.held.append((reserved, reserved.spend._replace(bytes=share * size), self.device.true_s))

    def settle(self) -> None:
        if self.held:
            reserved, spent, at_s = self.held.pop(self.random.randrange(len(self.held)))
            in_time = self.device.true_s - at_s < HELD_S
            reserved.settle(spent)
            self.early.append((at_s, spent))
            self.late.append((self.device.true_s if in_time else at_s, spent))

    def end(self) -> None:
        """Killed: what was sent for reservations that are open was spent in full."""
        lost = [(at_s, reserved.spend) for reserved, _, at_s in self.held]
        self.early, self.late = self.early + lost, self.late + lost
        self.held.clear()
        self.ledger.close()

    def restart(self, reboots: bool) -> None:
        self.end()
        if reboots:
            self.device.reboot(off_s=self.random.choice((0.0, 30.0)))
        self.ledger = Ledger(BUDGETS, self.path, self.device.now)

    def wait(self) -> None:
        self.device.wait(self.random.choice((1.0, 60.0, 150.0, 300.0)))

    def act(self) -> None:
        chance = self.random.random()
        if chance < 0.45:
            self.reserve()
        elif chance < 0.7:
            self.settle()
        elif chance < 0.95:
            self.wait()
        else:
            self.restart(reboots=chance < 0.985)


@pytest.mark.parametrize("seed", range(24))
def test_no_sequence_of_requests_kills_reboots_and_clock_steps_overspends(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TemporaryDirectory(dir=MEMORY) as folder:
        owner = Owner(seed, Path(folder, "l.db"))
        for _ in range(300):
            stepped = owner.random.uniform(-1e9, 1e9)  # the clock that people set
            monkeypatch.setattr(time, "time", lambda stepped=stepped: stepped)
            owner.act()
        owner.end()
    assert most_in_a_period(owner.late, HOURLY) > 0.4 * HOURLY.limit, "the owner is greedy enough to test it"
    for budget in BUDGETS:
        for log in (owner.early, owner.late):
            assert most_in_a_period(log, budget) <= budget.limit + 1e-6, budget.name


def most_in_a_period(log: Sequence[tuple[float, Spend]], budget: Budget) -> float:
    """What was spent in the half-open period that holds most."""
    amounts = [(at_s, float(getattr(spent, budget.amount))) for at_s, spent in log]
    return max(
        (sum(size for at_s, size in amounts if start_s <= at_s < start_s + budget.period_s) for start_s, _ in amounts),
        default=0.0,
    )


def test_a_day_of_requests_spends_nearly_the_whole_budget_and_evenly() -> None:
    device, budget = Device(), Budget("bytes", 100_000, DAY_S)
    ledger, hours = Ledger([budget], None, device.now), [0.0] * 48
    for hour in range(48):
        for _ in range(60):
            if (reserved := ledger.reserve(Spend(500))) is not None:
                reserved.settle(Spend(400))
                hours[hour] += 400
            device.wait(60)
    second_day = hours[24:]
    assert 0.85 * budget.limit < sum(second_day) <= budget.limit
    assert max(second_day) < 1.5 * min(second_day), "it is not all spent in the morning"


def test_without_budgets_everything_is_allowed_and_no_disk_is_touched(tmp_path: Path) -> None:
    ledger = Ledger((), tmp_path / "none" / "l.db")
    reserved = ledger.reserve(Spend(1e12))
    assert reserved is not None and ledger.allowance() == UNLIMITED
    reserved.settle(Spend(7, calls=1))
    reserved.settle(Spend(7, calls=1))
    assert ledger.totals.spent == Spend(7, calls=1), "the second settlement of one reservation counts for nothing"
    assert not (tmp_path / "none").exists()


def test_two_ledgers_of_one_file_share_the_budget(tmp_path: Path) -> None:
    device = Device()
    photos, prompts = (Ledger([HOURLY], tmp_path / "l.db", device.now) for _ in range(2))
    assert photos.reserve(Spend(60)) is not None
    assert prompts.reserve(Spend(60)) is None
    assert prompts.refusal(Spend(60)) == "the budget of bytes has 40 B left, 60 needed"
    assert prompts.reserve(Spend(40)) is not None
    assert (photos.totals.refused, prompts.totals.refused) == (0, 1)


def test_a_reservation_that_nobody_settles_counts_as_spent_after_a_while(tmp_path: Path) -> None:
    device = Device()
    ledger = Ledger([HOURLY], tmp_path / "l.db", device.now)
    lost = ledger.reserve(Spend(100))
    assert lost is not None
    device.wait(HELD_S + 1)
    assert ledger.reserve(Spend(100)) is not None, "its place is free again, and the hour has gone on"
    lost.settle(Spend(0))
    assert ledger.allowance().bytes < 200, "too late to be given back"


def test_time_while_the_device_is_off_earns_nothing(tmp_path: Path) -> None:
    device = Device()
    ledger = Ledger([HOURLY], tmp_path / "l.db", device.now)
    assert ledger.reserve(Spend(100)) is not None
    ledger.close()
    device.reboot(off_s=DAY_S)
    assert Ledger([HOURLY], tmp_path / "l.db", device.now).allowance().bytes < 1


def test_the_allowance_grows_between_entries(tmp_path: Path) -> None:
    device = Device()
    ledger = Ledger([HOURLY], tmp_path / "l.db", device.now)
    assert ledger.reserve(Spend(100)) is not None
    before = ledger.allowance().bytes
    device.wait(60)
    assert ledger.allowance().bytes >= before
    (bucket,) = ledger.buckets()
    assert bucket.budget is HOURLY and bucket.held == 100


def test_a_file_that_is_no_ledger_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "l.db").write_bytes(b"no ledger" * 1000)
    with pytest.raises(InvalidInput, match=r"l\.db cannot be used: file is not a database; without it no budget"):
        Ledger([HOURLY], tmp_path / "l.db")


def test_nothing_is_allowed_while_the_file_cannot_be_written(tmp_path: Path) -> None:
    ledger = Ledger([HOURLY], tmp_path / "l.db")
    ledger.close()
    assert ledger.reserve(Spend(1)) is None
    assert ledger.refusal(Spend(1)).endswith("l.db cannot be written")


def test_threads_never_spend_more_than_there_is(tmp_path: Path) -> None:
    ledger = Ledger([Budget("calls", 200, DAY_S)], tmp_path / "l.db")
    taken: list[int] = []

    def spend() -> None:
        for _ in range(10):
            if (reserved := ledger.reserve(Spend(calls=1))) is not None:
                reserved.settle(Spend(calls=1))
                taken.append(1)

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 20


KILLED = """
import sys
from pathlib import Path
from isthmus.edge_agent.ledger import Ledger
from isthmus.edge_agent.policy.budgets import DAY_S, Budget, Spend
ledger = Ledger([Budget("calls", 100, DAY_S)], Path(sys.argv[1]))
while ledger.reserve(Spend(calls=1)):
    print("sent", flush=True)
print("refused", flush=True)
sys.stdin.read()
"""


def test_processes_that_are_killed_again_and_again_never_send_more_than_the_budget(tmp_path: Path) -> None:
    said = ""
    for lines in (4, 3, 9):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "l.db")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(lines):
            said += (line := process.stdout.readline())
            if line == "refused\n":
                break
        os.kill(process.pid, signal.SIGKILL)
        said += process.communicate()[0]
    assert 4 <= said.count("sent") <= 10, "what may be spent at once is a tenth of the day's calls"
    assert "refused" in said


def test_a_share_of_what_is_left_may_be_spent(tmp_path: Path) -> None:
    ledger = Ledger([Budget("bytes", 1000.0, HOUR_S)], tmp_path / "l.db", Device().now)
    assert not ledger.spend(Spend(30.0), 0.25) and ledger.totals.refused == 0
    assert ledger.spend(Spend(25.0), 0.25) and not ledger.spend(Spend(25.0), 0.25)
    assert ledger.spend(Spend(25.0))
    assert Ledger().spend(Spend(1e12)), "without budgets"


def test_the_clock_is_that_of_the_boot() -> None:
    first, second = boot_clock(), boot_clock()
    assert first.boot == second.boot and second.seconds >= first.seconds > 0


def test_the_file_lies_in_the_users_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "isthmus" / "ledger.db"
