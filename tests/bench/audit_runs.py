"""Many runs of `policy.audit.Audit` at once, each until its first alarm: the same arithmetic, in arrays.

R is the number of runs, B of bets, N of photos to draw from.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.edge_agent.policy import audit
from isthmus.edge_agent.policy.audit import Bets, Level
from tests.bench.audit_recording import Recorded

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """Of each photo at one level: whether an exit answers, and differs."""

    exits_N: Bools
    differs_N: Bools

    @classmethod
    def of(cls, answers: Recorded, level: Level) -> Stream:
        """Every photo of a recording."""
        reached_NE = answers.scores_NE.astype(float) >= np.array(level.confidences)
        exits_N, rows = reached_NE.any(1), np.arange(len(answers))
        differs_N = answers.answers_NE[rows, reached_NE.argmax(1)] != answers.cloud_N
        return cls(exits_N, exits_N & differs_N)

    def __len__(self) -> int:
        return len(self.exits_N)


class Runs:
    """The state of R audits of the owner's level."""

    def __init__(self, epsilon: float, share: float, runs: int) -> None:
        self.share = share
        self.capitals_RB = np.full((runs, len(audit.ODDS)), audit.AT_START)
        self.lately_RB = np.ones((runs, len(audit.ODDS)))
        self._gains_2B = np.transpose(Bets(epsilon)._gains)
        self._inputs_R = np.zeros(runs, int)

    def draw(self, uniform_R: Floats) -> Bools:
        """One input of each run: which of them audit it."""
        self._inputs_R += 1
        raised_R = np.minimum(self.share * self.lately_RB.mean(1), audit.RAISED)
        drawn_R: Bools = uniform_R < np.maximum(self.share, raised_R)
        return drawn_R

    def add(self, rows: Ints, differs: Bools) -> Bools:
        """The pairs of these runs. Returns which of them alarm."""
        gain = self._gains_2B[differs.astype(int)]
        fresh = (1 - audit.AT_START) * self._inputs_R[rows, None] / audit.HORIZON
        self._inputs_R[rows] = 0
        self.capitals_RB[rows] = np.minimum((self.capitals_RB[rows] + fresh) * gain, audit.RICHEST)
        self.lately_RB[rows] = np.clip(self.lately_RB[rows] * gain, 1.0, audit.RICHEST)
        alarms: Bools = self.capitals_RB[rows].mean(1) >= 1 / audit.ALPHA
        return alarms

    def only(self, which_R: Bools) -> Runs:
        """A copy of some of them."""
        part = copy.copy(self)
        for name in ("capitals_RB", "lately_RB", "_inputs_R"):
            setattr(part, name, getattr(self, name)[which_R])
        return part


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
        drawn_R = runs.draw(random.random(count)) & running_R
        seen += int(running_R.sum())
        rows = np.flatnonzero(drawn_R)
        if not rows.size:
            continue
        photos = index_R[rows]
        uploads += int(stream.exits_N[photos].sum())
        alarms = runs.add(rows, stream.differs_N[photos])
        alarm_R[rows[alarms]] = at
    return Outcome(alarm_R, uploads, seen)
