"""Many runs of `policy.audit.Audit` at once, each until its first alarm: the same arithmetic, in arrays.

R is the number of runs, B of bets, N of photos to draw from.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.edge_agent.policy import audit
from isthmus.edge_agent.policy.audit import Audit, Bets, Level
from tests.bench.audit_recording import Recorded

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """Of each photo at one level: whether the first exit that may answer does, whether any does, and differs."""

    reached_N: Bools
    exits_N: Bools
    differs_N: Bools

    @classmethod
    def of(cls, answers: Recorded, level: Level) -> Stream:
        """Every photo of a recording. `level` has an exit that may answer."""
        assert level.first is not None
        reached_NE = answers.scores_NE.astype(float) >= np.array(level.confidences)
        exits_N, rows = reached_NE.any(1), np.arange(len(answers))
        differs_N = answers.answers_NE[rows, reached_NE.argmax(1)] != answers.cloud_N
        return cls(reached_NE[:, level.first], exits_N, exits_N & differs_N)

    def __len__(self) -> int:
        return len(self.exits_N)


def gains_of(rate: Floats) -> Floats:
    """(..., 2, B): what each bet on a rate gains where it does not happen, and where it does."""
    flat = [np.transpose(Bets(each)._gains) for each in np.ravel(rate)]
    return np.array(flat).reshape(*np.shape(rate), 2, len(audit.ODDS))


class Runs:
    """The state of R audits of the owner's level."""

    def __init__(self, epsilon: float, level: Level, share: float, runs: int) -> None:
        self.share, self.pairs_due = share, Audit(epsilon, [level], share).pairs_due
        self.capitals_RB = np.full((runs, len(audit.ODDS)), audit.AT_START)
        self.lately_RB = np.ones((runs, len(audit.ODDS)))
        self._gains_2B = gains_of(np.array(epsilon))
        self._exits_2RB = np.ones((2, runs, len(audit.ODDS)))  # bets on more and on fewer exits
        self._exit_gains_2R2B = np.empty((2, runs, 2, len(audit.ODDS)))
        self._expect(np.full(runs, True), np.full(runs, level.first_share))
        self._inputs_R, self._reached_R, self._count_R = (np.zeros(runs, int) for _ in range(3))

    def draw(self, reached_R: Bools, uniform_R: Floats) -> Bools:
        """One input of each run: which of them audit it."""
        self._inputs_R += 1
        rows = np.arange(len(reached_R))
        for each, happened_R in enumerate((reached_R, ~reached_R)):
            gain_RB = self._exit_gains_2R2B[each, rows, happened_R.astype(int)]
            self._exits_2RB[each] = np.clip(self._exits_2RB[each] * gain_RB, 1.0, audit.RICHEST)
        raised_R = np.where(self._odd_R(rows), audit.RAISED, self.share * self.lately_RB.mean(1))
        drawn_R: Bools = uniform_R < np.maximum(self.share, np.minimum(raised_R, audit.RAISED))
        return drawn_R

    def add(self, rows: Ints, differs: Bools, reached: Bools) -> Bools:
        """The pairs of these runs. Returns which of them alarm."""
        gain = self._gains_2B[differs.astype(int)]
        fresh = (1 - audit.AT_START) * self._inputs_R[rows, None] / audit.HORIZON
        self._inputs_R[rows] = 0
        self.capitals_RB[rows] = np.minimum((self.capitals_RB[rows] + fresh) * gain, audit.RICHEST)
        self.lately_RB[rows] = np.clip(self.lately_RB[rows] * gain, 1.0, audit.RICHEST)
        alarms: Bools = self.capitals_RB[rows].mean(1) >= 1 / audit.ALPHA
        odd = self._odd_R(rows)
        self._reached_R[rows] = np.where(odd, self._reached_R[rows] + reached, 0)
        self._count_R[rows] = np.where(odd, self._count_R[rows] + 1, 0)
        learnt = self._count_R >= self.pairs_due
        learnt &= self.lately_RB.mean(1) < audit.ODD
        if learnt.any():
            self._expect(learnt, self._reached_R[learnt] / self._count_R[learnt])
            self._reached_R[learnt] = self._count_R[learnt] = 0
        return alarms

    def only(self, which_R: Bools) -> Runs:
        """A copy of some of them."""
        part = copy.copy(self)
        for name in ("capitals_RB", "lately_RB", "_inputs_R", "_reached_R", "_count_R"):
            setattr(part, name, getattr(self, name)[which_R])
        part._exits_2RB, part._exit_gains_2R2B = self._exits_2RB[:, which_R], self._exit_gains_2R2B[:, which_R]
        return part

    def _odd_R(self, rows: Ints) -> Bools:
        odd: Bools = self._exits_2RB[:, rows].mean(2).max(0) >= audit.ODD
        return odd

    def _expect(self, which_R: Bools, share: Floats) -> None:
        """Of some runs, the share of inputs that exit, from now on."""
        for each, rate in enumerate((share + audit.TOLERANCE, 1 - share + audit.TOLERANCE)):
            self._exits_2RB[each, which_R] = 1.0
            self._exit_gains_2R2B[each, which_R] = gains_of(rate)


@dataclass(frozen=True)
class Outcome:
    """Of each run: inputs until its alarm, 0 without one; and over all runs the uploads of audits, and the inputs."""

    alarm_R: Ints
    uploads: int
    inputs: int


def run(runs: Runs, stream: Stream, inputs: int, random: np.random.Generator) -> Outcome:
    """So many inputs at most of each run, drawn at random from a stream; a run ends with its alarm."""
    count = len(runs.capitals_RB)
    alarm_R, uploads, seen = np.zeros(count, int), 0, 0
    for at in range(1, inputs + 1):
        index_R = random.integers(len(stream), size=count)
        running_R = alarm_R == 0
        drawn_R = runs.draw(stream.reached_N[index_R], random.random(count)) & running_R
        seen += int(running_R.sum())
        rows = np.flatnonzero(drawn_R)
        if not rows.size:
            continue
        photos = index_R[rows]
        uploads += int(stream.exits_N[photos].sum())
        alarms = runs.add(rows, stream.differs_N[photos], stream.reached_N[photos])
        alarm_R[rows[alarms]] = at
    return Outcome(alarm_R, uploads, seen)
