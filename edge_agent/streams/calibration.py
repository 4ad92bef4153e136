"""Which change may be overlooked: thresholds of the gate, certified on a clip of the camera.

    every frame of the clip is answered -> for each threshold, the gate as it would have been -> loss of each block:
    share of its frames that would have had a last answer which differs from their own -> the least epsilon certified

Frames that follow each other are alike, so they are no samples; blocks as long as an answer may be reused are taken for
samples. Thresholds are tested from 0 on, in an order fixed beforehand, and need no correction for their number.

Sources: learn-then-test with fixed-sequence testing (Angelopoulos et al., 2021); the Hoeffding-Bentkus p-value of
losses in [0, 1] (Bates et al., 2021).
"""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.edge_agent.policy.recalibration import BISECTIONS, binomial_cdf
from isthmus.edge_agent.state_file import open_state, transaction
from isthmus.edge_agent.streams.agreement import differs
from isthmus.edge_agent.streams.gate import Bytes, ChangeGate
from isthmus.models.errors import InvalidInput
from isthmus.models.user_folders import user_folder

DELTA = 0.1  # a certificate fails with at most this probability
GRID = tuple(round(0.05 * 1.25**step, 4) for step in range(20))  # 0.05 ... 3.5 standard deviations of luma
MOST_FRAMES = 50_000  # of a clip: their thumbnails are held
SCHEMA = "CREATE TABLE IF NOT EXISTS gates (bundle TEXT, camera TEXT, value TEXT, PRIMARY KEY (bundle, camera));"


@dataclass(frozen=True, slots=True)
class Seen:
    """One frame of a clip. `answers`: by task, as JSON."""

    at_s: float
    thumbnail: Bytes
    answers: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Certificate:
    """P(share of frames with a reused answer that differs > epsilon) <= DELTA, for frames as those of `blocks`."""

    threshold: float
    epsilon: float
    reused: float  # share of the clip's frames
    differing: float  # share of the clip's frames: reused, and not what their own answer says
    blocks: int
    frames: int
    most_s: float  # for how long answers were reused


def certify(frames: Sequence[Seen], most_s: float) -> list[Certificate]:
    """Of every threshold of GRID, with epsilon rising. Raises InvalidInput without frames."""
    if not frames:
        raise InvalidInput("the source has no frames to calibrate with")
    block_of_N = np.array([int(frame.at_s // most_s) for frame in frames])
    found = []
    for threshold in GRID:
        reused_N, differing_N = replay(frames, threshold, most_s)
        losses = [float(differing_N[block_of_N == block].mean()) for block in np.unique(block_of_N)]
        found.append((threshold, least_epsilon(losses), reused_N.mean(), differing_N.mean(), len(losses)))
    rising = itertools.accumulate((epsilon for _, epsilon, *_ in found), max)
    return [
        Certificate(threshold, epsilon, float(reused), float(differing), blocks, len(frames), most_s)
        for (threshold, _, reused, differing, blocks), epsilon in zip(found, rising, strict=True)
    ]


def replay(frames: Sequence[Seen], threshold: float, most_s: float) -> tuple[Any, Any]:
    """Which frames would have reused an answer, and which of those another one than their own."""
    gate, reference = ChangeGate(threshold, most_s), frames[0]
    reused_N, differing_N = np.zeros(len(frames), bool), np.zeros(len(frames), bool)
    for index, frame in enumerate(frames):
        if gate.reuses(gate.measure(frame.thumbnail), frame.at_s):
            reused_N[index] = True
            differing_N[index] = differs(reference.answers, frame.answers)
        else:
            gate.refer(frame.thumbnail, frame.at_s)
            reference = frame
    return reused_N, differing_N


def least_epsilon(losses: Sequence[float]) -> float:
    """The least epsilon that losses in [0, 1] certify for their mean; at most 1."""
    mean, low, high = math.fsum(losses) / len(losses), 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(mean, len(losses), middle) <= DELTA else (middle, high)
    return high


def p_value(mean: float, count: int, epsilon: float) -> float:
    """Hoeffding-Bentkus: of "the mean loss is above epsilon", from the mean of `count` losses in [0, 1]."""
    if mean >= epsilon:
        return 1.0
    hoeffding = math.exp(-count * divergence(mean, epsilon))
    bentkus = math.e * binomial_cdf(math.ceil(count * mean - 1e-9), count, epsilon)
    return min(1.0, hoeffding, bentkus)


def divergence(mean: float, epsilon: float) -> float:
    """Kullback-Leibler, of two Bernoulli distributions with 0 <= mean < epsilon <= 1."""
    if epsilon >= 1:
        return math.inf
    first = mean * math.log(mean / epsilon) if mean > 0 else 0.0
    return first + (1 - mean) * math.log((1 - mean) / (1 - epsilon))


def choose(certificates: Sequence[Certificate], epsilon: float, most_s: float) -> Certificate | None:
    """The most permissive one of at most `epsilon`; None without one, or where answers are now reused for longer."""
    fit = [each for each in certificates if each.epsilon <= epsilon and most_s <= each.most_s]
    return fit[-1] if fit else None


def state_path() -> Path:
    return user_folder("state") / "streams.db"


def save(path: Path, bundle: str, camera: str, certificates: Sequence[Certificate]) -> None:
    """In place of earlier ones of this camera. Raises InvalidInput for a file that cannot be used."""
    value = json.dumps([asdict(each) for each in certificates])
    try:
        with closing(open_state(path, SCHEMA)) as file, transaction(file):
            file.execute("INSERT OR REPLACE INTO gates VALUES (?, ?, ?)", (bundle, camera, value))
    except (OSError, sqlite3.Error) as error:
        raise InvalidInput(f"the calibration cannot be saved in {path}: {error}") from error


def load(path: Path, bundle: str, camera: str) -> list[Certificate]:
    """Of this bundle and camera; none without a calibration. Raises InvalidInput for a file that cannot be used."""
    if not path.exists():
        return []
    try:
        with closing(open_state(path, SCHEMA)) as file:
            row = file.execute("SELECT value FROM gates WHERE bundle = ? AND camera = ?", (bundle, camera)).fetchone()
        return [Certificate(**each) for each in json.loads(row[0])] if row else []
    except (OSError, sqlite3.Error, TypeError, ValueError) as error:
        raise InvalidInput(f"the calibration in {path} cannot be used: {error}") from error
