"""Which token follows: greedy, or sampled with noise that device and cloud share.

A sampled token is the argmax of logits / temperature + Gumbel noise, and the noise is a function of seed and position
alone (the Gumbel-max trick). So the cloud's answer is one fixed sequence for a seed, whoever drafts: a draft counts
exactly when it is that token, and the distribution is the cloud's own. A device that drafts with the same noise is
accepted nearly as often as under rejection sampling, with no probabilities on the wire (Daliri, Musco, Suresh,
"Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from isthmus.models.messages import Sampling

Floats = NDArray[np.float32]


def choose(logits_V: Floats, sampling: Sampling, position: int) -> int:
    """The token at `position` (0 for the first of the prompt); of equals the lowest id."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    with np.errstate(over="ignore"):  # at a temperature of almost 0 only the likeliest stay above -inf
        scaled_V = (logits_V.astype(np.float64) - float(logits_V.max())) / sampling.temperature
    if sampling.top_p < 1:
        scaled_V = nucleus(scaled_V, sampling.top_p)
    return int((scaled_V + gumbel(len(scaled_V), sampling.seed, position)).argmax())


def gumbel(size: int, seed: int, position: int) -> NDArray[np.float64]:
    """Standard Gumbel noise (size,), the same wherever it is drawn: Philox is counter-based."""
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, position])
    uniform_V = np.random.Generator(bits).random(size)
    noise_V: NDArray[np.float64] = -np.log(-np.log(np.maximum(uniform_V, np.finfo(np.float64).tiny)))
    return noise_V


def nucleus(scaled_V: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Everything outside the smallest set with probability `top_p` at -inf (Holtzman et al., 2020)."""
    probabilities_V = np.exp(scaled_V - scaled_V.max())
    probabilities_V /= probabilities_V.sum()
    order_V = np.argsort(-probabilities_V, kind="stable")
    before_V = np.cumsum(probabilities_V[order_V]) - probabilities_V[order_V]
    kept = order_V[before_V < top_p]
    result_V = np.full_like(scaled_V, -np.inf)
    result_V[kept] = scaled_V[kept]
    return result_V


def log_softmax(logits_V: Floats) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities at temperature 1."""
    shifted_V = logits_V.astype(np.float64) - float(logits_V.max())
    return shifted_V - float(np.log(np.exp(shifted_V).sum()))


def logprobs(logits_V: Floats, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log probability of `token`, and (id, log probability) of the `count` likeliest, likeliest first."""
    logs_V = log_softmax(logits_V)
    top = np.argsort(-logs_V, kind="stable")[:count]
    return float(logs_V[token]), tuple((int(id_), float(logs_V[id_])) for id_ in top)
