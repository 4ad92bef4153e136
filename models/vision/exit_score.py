"""What an exit's answer is judged by: its highest probability, or its correctness head.

A correctness head is a logistic regression of a handful of features. It predicts whether an answer costs nothing
against the cloud model's; what counts is how it ranks answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.models.vision.manifest import Exit
from isthmus.models.vision.outputs import ExitOutput

Floats = NDArray[np.float32]

DETECTED = 2  # dimensions of a detector's scores; a map has three

LEAST = 1e-6  # a probability below it counts as it


def exit_score(exits: Sequence[ExitOutput], exit_: Exit) -> float:
    """The score, 0 to 1, of the last of the exits run so far, from what they gave.

    Of a detector: how sure the exit is that there is nothing, 1 less the highest score. Of other kinds: 0.
    """
    last = exits[-1]
    exits_K = [each for each in exits if isinstance(each, np.ndarray)]
    if not isinstance(last, np.ndarray):
        scores_NC = last.get("scores") if last else None
        return 1 - float(scores_NC.max(initial=0.0)) if scores_NC is not None and scores_NC.ndim == DETECTED else 0.0
    if exit_.score is None:
        return float(exits_K[-1].max())
    return sigmoid(exit_.score.bias + float(np.dot(features(exits_K), exit_.score.weights)))


def features(exits_K: Sequence[Floats]) -> Floats:
    """FEATURES numbers about the last of the exits run so far.

    Log-odds of its answer, logarithm of how much more likely it is than the second, entropy of its probabilities,
    whether the exit before has the same answer, and the logarithm of the probability there. Without one before: 0, 0.
    """
    last_K = exits_K[-1]
    answer = int(last_K.argmax())
    first, second = (float(value) for value in np.partition(last_K, -2)[:-3:-1])
    clipped_K = np.maximum(last_K, LEAST)
    entropy = -float(np.dot(clipped_K, np.log(clipped_K)))
    same, before = 0.0, 0.0
    if len(exits_K) > 1:
        same = float(int(exits_K[-2].argmax()) == answer)
        before = math.log(max(float(exits_K[-2][answer]), LEAST))
    return np.array(
        [log_odds(first), math.log(max(first, LEAST) / max(second, LEAST)), entropy, same, before], np.float32
    )


def log_odds(probability: float) -> float:
    """Of a probability, at least LEAST away from 0 and 1."""
    inside = min(max(probability, LEAST), 1 - LEAST)
    return math.log(inside / (1 - inside))


def sigmoid(logit: float) -> float:
    """The probability of log-odds."""
    return 1 / (1 + math.exp(-min(max(logit, -60.0), 60.0)))
