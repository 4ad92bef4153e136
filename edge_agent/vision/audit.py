"""The audit of photos: sends some that an exit answered, in the background, and moves to a stricter threshold.

    answer is ready -> unlike those before? -> policy.audit
                    -> drawn? -> bounded queue -> a thread of its own -> rest of the head, whole photo to the cloud
                                                                      -> pair on disk -> policy.audit -> thresholds

No answer waits for it, nor fails with it: what cannot be audited is counted and forgotten. It begins while no photo is
being answered, and goes on after PATIENCE_S where that never happens; it takes a slot for one segment at a time, if one
is free. What it shares with answers is the link, one photo at a time. The photo is sent as PNG: the cloud model's
answer to the photo as it is decides, and every other way would add disagreement of its own.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from isthmus.edge_agent.policy.audit import DELTA, UNKNOWN, Audit, Level, Pair
from isthmus.edge_agent.policy.drift import DriftGate, statistics
from isthmus.edge_agent.policy.recalibration import recalibrated, upper_bound
from isthmus.edge_agent.slots import FairSlots
from isthmus.edge_agent.vision.audit_metrics import AuditMetrics, Result
from isthmus.edge_agent.vision.audited_pairs import AuditedPairs
from isthmus.edge_agent.vision.exit_rule import ExitRule
from isthmus.edge_agent.vision.request import Floats, RequestState
from isthmus.edge_agent.vision.result import Answer
from isthmus.models.vision.head import Head
from isthmus.models.vision.manifest import NEVER, Among, Promise, Threshold
from isthmus.models.vision.manifest import Head as Described

MOST_QUEUED = 4  # photos in memory
PATIENCE_S = 5.0  # that an audited photo waits for a device without work
POLL_S = 0.02
DEADLINE_S = 15.0  # of an audited photo's exchange
CLOSE_S = 2.0  # that `close` waits for the photo under way
STATE = "audit"  # key of the audit's state
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """What the audit needs of an agent. `cloud`: index of the cloud's answer to a photo; raises IsthmusError."""

    head: Head
    slots: FairSlots
    busy: Callable[[], bool]
    cloud: Callable[[Image.Image], int]
    use: Callable[[Sequence[float]], None]  # thresholds from now on, of each exit


@dataclass(frozen=True, slots=True)
class Job:
    """A photo that was drawn. `exits_K`: probabilities of the exits that ran; `exited`: one of them answered."""

    image: Image.Image
    pixels_CHW: Floats
    exits_K: tuple[Floats, ...]
    exited: bool


class Auditor:
    """The audit of one agent's exits, and its thread, which starts with the first photo that is drawn.

    The lock is held for what is computed in microseconds, never while a file or the cloud is waited for.
    """

    def __init__(
        self,
        audit: Audit,
        pairs: AuditedPairs,
        rule: ExitRule,
        device: Device,
        metrics: AuditMetrics | None,
        auto: bool,
        gate: DriftGate | None = None,
    ) -> None:
        """`auto`: make new thresholds without being asked. Without a `gate` inputs are not compared with those before.

        Goes on from what `pairs` holds.
        """
        self.audit, self.pairs, self._gate = audit, pairs, gate
        self._rule, self._device, self._metrics, self._auto = rule, device, metrics, auto
        self._jobs: queue.Queue[Job | None] = queue.Queue(MOST_QUEUED)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._new_doubt = False  # not on disk yet
        self._lock = threading.Lock()  # of the audit, and the start of the thread
        try:
            with pairs.entry() as state:
                self._load(state)
        except sqlite3.Error as error:  # another process writes; the next pair finds the state
            log.warning("the audit's state cannot be read: %s", error)
        self._apply()

    def answered(self, state: RequestState, answer: Answer, image: Image.Image, pixels_CHW: Floats) -> None:
        """A photo was answered; draws it or not. Returns at once, and raises nothing."""
        if self._closed or not auditable(state) or answer.route == "fallback":
            return
        try:
            exits_K = tuple(each for each in state.exits if isinstance(each, np.ndarray))  # all: the task classifies
            with self._lock:
                self._look(state.first_features, exits_K)
                drawn = self.audit.draw()
            if drawn and self._jobs.full():
                self._count("skipped")
            elif drawn:
                self._put(Job(image, pixels_CHW, exits_K, answer.route == "exit"))
        except Exception as error:  # out of memory or threads: the answer is right all the same
            self._failed(error)

    def wait(self) -> None:
        """Wait until nothing is queued."""
        self._jobs.join()

    def close(self) -> None:
        """Drop what is queued, and wait CLOSE_S at most for the photo under way, whose link is closed already."""
        self._closed = True
        if self._thread is None:
            self.pairs.close()
            return
        with suppress(queue.Full):  # the thread is not waiting then
            self._jobs.put_nowait(None)
        self._thread.join(CLOSE_S)

    def _put(self, job: Job) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="isthmus-audit", daemon=True)
                thread.start()
                self._thread = thread
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._count("skipped")

    def _look(self, features: Floats | None, exits_K: Sequence[Floats]) -> None:
        """Whether this input looks unlike those before; nothing where the head did not run."""
        if self._gate is None or self.audit.doubted or features is None or not exits_K:
            return
        self._gate.observe(statistics(features, self._rule.score(exits_K[:1])))
        if not self._gate.alarm:
            return
        alarm = self.audit.alarm
        self._gate, self._new_doubt = DriftGate(), True
        self.audit.doubt()
        log.warning(
            "photos look unlike those before: %d of them are checked by the cloud%s",
            self.audit.pairs_due,
            "" if self.audit.in_force else ", and no exit answers until then",
        )
        if self._metrics:
            self._metrics.drifted()
            if not alarm:
                self._metrics.alarmed()
        self._apply()

    def _work(self) -> None:
        while not self._closed:
            job = self._jobs.get()
            try:
                if job is not None and not self._closed:
                    self._count(self._audit(job))
            except Exception as error:  # whatever it is, no answer depends on it
                self._failed(error)
            finally:
                self._jobs.task_done()
        self.pairs.close()

    def _failed(self, error: Exception) -> None:
        if not self._closed:
            log.info("a photo could not be audited: %s", error)
            self._count("failed")

    def _audit(self, job: Job) -> Result:
        """Audit one photo. Raises what the link and the file raise."""
        until_s = time.monotonic() + PATIENCE_S
        while self._device.busy() and time.monotonic() < until_s and not self._closed:
            time.sleep(POLL_S)
        exits_K = self._all_exits(job, until_s)
        if exits_K is None:
            return "skipped"
        scores = tuple(self._rule.score(exits_K[: index + 1]) for index in range(len(exits_K)))
        asked = job.exited or self.audit.alarm
        cloud = self._device.cloud(job.image) if asked else UNKNOWN
        pair = Pair(scores, tuple(int(row.argmax()) for row in exits_K), cloud)
        if not asked and any(level.exit(scores) is not None for level in self.audit.levels[self.audit.level :]):
            pair = Pair((0.0,) * len(scores), pair.answers, UNKNOWN)  # sent before the exit that would have answered
        level = self.audit.in_force
        self._record(pair)
        if level is None or level.exit(pair.scores) is None:
            return "sent"
        return "differ" if level.differs(pair) else "agree"

    def _all_exits(self, job: Job, until_s: float) -> list[Floats] | None:
        """Probabilities of every exit, each segment computed while a slot is free; None if none is for long."""
        head = self._device.head
        if len(job.exits_K) == head.exits:
            return list(job.exits_K)
        x_CHW, found = job.pixels_CHW, list[Floats]()
        for index in range(head.exits):
            while not self._device.slots.acquire(0):
                if time.monotonic() > until_s or self._closed:
                    return None
                time.sleep(POLL_S)
            try:
                x_CHW, probabilities_K = head.segment(index, x_CHW)
            finally:
                self._device.slots.release()
            if isinstance(probabilities_K, np.ndarray):
                found.append(probabilities_K)
        return found

    def _record(self, pair: Pair) -> None:
        """Keep a pair, and act on it."""
        with self.pairs.entry() as state:
            with self._lock:
                self._load(state)
                if self._new_doubt:
                    self.audit.doubt()
                    self._new_doubt = False
                before, level = self.audit.alarm, self.audit.level
                self.audit.add(pair)
            self.pairs.add(pair, before)
            if self._auto and self.audit.alarm:
                self._recalibrate()
            if before and not self.audit.alarm:
                self.pairs.alarm_ended()
            state[STATE] = self.audit.dump()
        self._tell(before, level)
        self._apply()

    def _tell(self, before: bool, level: int) -> None:
        """Log what a pair changed, and count it. `before`, `level`: alarm and level before it."""
        if self.audit.alarm and not before and self._metrics:
            self._metrics.alarmed()
        if self.audit.level > level:
            log.warning(
                "exits differ from the cloud model in more than %.2g %% of all photos: %s",
                100 * self.audit.epsilon,
                "a stricter threshold is used" if self.audit.in_force else "no exit answers any more",
            )
        elif before and not self.audit.alarm:
            log.info("exits differ from the cloud model no more often than promised: the alarm ends")

    def _recalibrate(self) -> None:
        """Make new levels, at numbers of pairs that double; the chance of a wrong certificate is divided among them."""
        count, attempt, due = self.audit.pairs_in_alarm, 1, self.audit.pairs_due
        while due < count:
            attempt, due = attempt + 1, 2 * due
        if due != count:
            return
        found = recalibrated(self.pairs.pairs(in_alarm=True), self.audit.epsilon, DELTA / 2**attempt)
        if not found:
            return
        with self._lock:
            self.audit.renew([each.level for each in found])
        log.warning("new thresholds from %d audited pairs: exits answer %.0f %%", count, 100 * found[0].coverage)
        if self._metrics:
            self._metrics.renewed()

    def _load(self, state: dict[str, Any]) -> None:
        """Go on from what this or another process has found."""
        try:
            if STATE in state:
                self.audit.load(state[STATE])
        except (KeyError, TypeError, ValueError) as error:
            log.warning("the audit's state is not readable and begins anew: %r", error)

    def _apply(self) -> None:
        level = self.audit.in_force
        self._device.use(level.confidences if level else (NEVER,) * self._device.head.exits)
        if self._metrics:
            self._metrics.observe(self.audit)

    def _count(self, result: Result) -> None:
        if self._metrics:
            self._metrics.result(result)


def auditable(state: RequestState) -> bool:
    """Whether an exit might have answered this photo, and it may be sent."""
    request = state.request
    barred = request.private or request.forced_split or state.cancelled or state.device_only
    return not barred and request.no_exit is None and request.tasks == (0,)


def audited_levels(
    described: Described, epsilon: float, promise: Promise = "accuracy", among: Among = "all"
) -> tuple[float, tuple[Level, ...]]:
    """The rate of disagreement that is promised at the owner's epsilon, and its levels, strictest last.

    A certificate of accuracy says nothing about disagreement without a loss, so that what its calibration part showed
    counts: the upper bound with the certificate's own confidence. The rate is among all inputs, whichever `among` is.
    """
    allowed = sorted(
        (each for each in described.thresholds if (each.promise, each.among) == (promise, among)),
        key=lambda each: -each.epsilon,
    )
    usable = [each for each in allowed if each.epsilon <= epsilon + 1e-12 and each.answers]
    levels: list[Level] = []
    for each in usable:
        level = Level(tuple(each.confidences))
        if not levels or level.confidences != levels[-1].confidences:
            levels.append(level)
    bound = promised(usable[0]) if usable and promise == "accuracy" else 0.0
    return max(epsilon, bound), tuple(levels)


def promised(threshold: Threshold) -> float:
    """The rate of disagreement among all inputs that its calibration part bounds."""
    differing = round(threshold.coverage * (1 - threshold.agreement) * threshold.samples)
    return upper_bound(differing, threshold.samples, threshold.delta)
